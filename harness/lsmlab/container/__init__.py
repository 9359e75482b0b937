"""Containers in a guest: the Docker SDK over our own channel, the engine's installation, one container and what is run
in it."""
