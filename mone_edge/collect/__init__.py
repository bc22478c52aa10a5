"""Collectors: a model and calibration tokens in, ExpertStats out. One module per kind of model."""
