"""Variational inference for deep generative models, in Pyro."""
