"""How modalities meet: the cross-modal gate."""
