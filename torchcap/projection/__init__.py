"""The pieces: projections, parametrizations and initialisers; no graph, no plan."""
