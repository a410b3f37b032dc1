"""Every method of the paper's tables in one harness, and a controlled study of its claims."""
