"""How fast the losses are on this machine, beside torch and other packages, and what bounds them.

``cases`` and ``goals`` are plain data (standard library only); ``run`` times, ``table`` and
``plots`` show. Only this package and ``doctor`` know the compiled module besides ``ops``.
"""
