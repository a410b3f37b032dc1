"""One file a method; a new one is a file here, its test, and a line in ``catalogue``."""
