"""Lets orbax store arrays in ``s3://``. TensorStore can, but orbax 0.12.8 tells it of ``gs://`` alone.

Three functions of orbax decide what an address means to TensorStore. They are private; where a version of
orbax has others, ``teach`` says so instead of writing to a folder called ``s3:``.
"""

from __future__ import annotations

import os
from typing import Any

_S3 = "s3://"


def _server() -> dict[str, str]:
    """Another server than Amazon's, where the variables that all of Amazon's tools read name one."""
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    address = next((os.environ[name] for name in names if os.environ.get(name)), None)
    if address is None:
        return {}
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    return {"endpoint": address.rstrip("/"), "aws_region": region}


def teach() -> None:
    """From now on orbax stores arrays in ``s3://`` too; a second call changes nothing.

    Raises:
      ValueError: this version of orbax decides in another way.
    """
    from orbax.checkpoint._src.path import gcs_utils
    from orbax.checkpoint._src.serialization import tensorstore_utils

    names = {
        tensorstore_utils: ("_normalize_path", "_use_gcs_driver"),
        gcs_utils: ("get_kvstore_for_gcs",),
    }
    lacking = [name for module, known in names.items() for name in known if not hasattr(module, name)]
    if lacking:
        raise ValueError(
            f"s3:// is not known to this version of orbax-checkpoint (it has no {lacking[0]}): install "
            "0.12.8, or mount the bucket"
        )
    if getattr(tensorstore_utils, "knows_s3", False):
        return
    utils: Any = tensorstore_utils
    gcs: Any = gcs_utils
    normal, is_remote, store = utils._normalize_path, utils._use_gcs_driver, gcs.get_kvstore_for_gcs

    def s3_store(path: str) -> dict[str, Any]:
        if not path.startswith(_S3):
            return store(path)
        bucket, _, inside = path.removeprefix(_S3).partition("/")
        return {"driver": "s3", "bucket": bucket, "path": inside, **_server()}

    def normalised(path: str) -> str:
        found = normal(path)
        return found if found.startswith(_S3) else found.replace("s3:/", _S3, 1)

    utils._normalize_path = normalised
    utils._use_gcs_driver = lambda path: path.startswith(_S3) or is_remote(path)
    gcs.get_kvstore_for_gcs = s3_store
    utils.knows_s3 = True
