"""Reading: from a model to its channel spaces. Nothing here changes a model."""
