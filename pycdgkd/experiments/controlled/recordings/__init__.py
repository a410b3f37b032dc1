"""The controlled study on recordings: files as DEAP's, their preparation, the real networks."""
