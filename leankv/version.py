"""The version, for the package's face and for what results say of themselves."""

__version__ = "0.1.0"
