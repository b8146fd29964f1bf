"""Ablations: arms times seeds on equal budgets, and what was expected of them before they ran."""
