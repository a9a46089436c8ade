"""Hydra configuration, shipped as package data: pkg://nearfield.configs."""
