"""How decisions are executed: faster stages and export."""
