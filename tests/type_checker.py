"""How annotations are checked while tests run: jaxtyping's pytest hook gives them to this, shapes and all."""

from beartype import BeartypeConf, beartype

# A whole number serves where a float is asked for, as in every type checker of Python (PEP 484).
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
