"""How fast a model answers here: what `edgeinfer bench` measures, shows and draws."""
