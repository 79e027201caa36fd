"""Running a bundle: images and words in, boxes out. No torch, no transformers.

In the order in which data flows: ``images/`` (a file becomes pixels), ``prompt`` (an expression
becomes ids), ``session`` (the public face, which leads through all of it), ``visual_tokens`` and
``texts`` (what the decoder sees of the image, and the pruner of the text), ``generation`` (the one
loop), ``answers`` and ``boxes`` (a text becomes a box in pixels), ``grounding`` (what is answered)
and ``drawing``. ``backends/`` runs the components: ``backend`` says what that takes.
"""
