"""How good is a model: the table (`evaluate`), what it rests on (`protocol`, `metrics`, `baselines`), pictures."""
