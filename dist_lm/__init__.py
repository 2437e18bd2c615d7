"""dist_lm: distributed GPT pretraining that gives the same curve on any hardware."""

__version__ = "0.1.0"
