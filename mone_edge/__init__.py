"""mone-edge: Mixture-of-Experts language models, pruned with novices, for laptops and phones."""

__version__ = "0.1.0"
