"""Saved models: one safetensors file that says how the model is to be built again."""
