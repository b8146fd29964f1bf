"""Evaluation kits of others run our models: what each of them asks for, and what is answered.

    lmms-eval    its entry point finds ``kits/lmms_eval.py``
    VLMEvalKit   ``python -m vl_jax.kits.vlmevalkit`` puts our models on its list and starts it

Each kit is imported in its own file only, and is no dependency. See docs/kits.md.
"""
