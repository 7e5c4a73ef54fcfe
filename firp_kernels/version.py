__version__ = "0.1.0"


def extension_name(torch_version: str) -> str:
    """Module of firp_kernels that is compiled for this torch, such as _C_torch_2_13. setup.py reads this, too."""
    return "_C_torch_{}_{}".format(*torch_version.split(".")[:2])
