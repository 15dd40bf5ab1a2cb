"""The pieces: projections, parametrizations and initialisers; tensors and axes, no graph, no plan."""
