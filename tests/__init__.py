"""LeanKV's tests. `type_checker` is imported here since jaxtyping's pytest hook finds it by its dotted name."""

from tests import type_checker as type_checker
