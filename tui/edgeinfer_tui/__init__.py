"""The terminal chat. Knows `edgeinfer.client` and the public names, nothing below them."""
