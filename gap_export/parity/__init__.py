"""Whether a bundle computes what PyTorch does: ``check`` leads through it.

``truth`` asks the reference (PyTorch, or a golden of it, see ``golden/``) and ``replay`` records
what it was fed; ``candidate`` feeds a backend the same; ``tally`` and ``compare`` measure tensors;
``levels/`` judge positions, tensors, tokens, boxes and the task; ``results`` is the report.
``inside/`` finds where a difference begins, ``patched/`` compares with an export that was patched.
"""
