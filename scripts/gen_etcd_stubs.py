"""Makes xllm_py/registry/etcd_stubs from the descriptors inside the etcd3 wheel, for today's protobuf runtime.

etcd3 0.12.0 carries code of an old protoc that protobuf 4 and later refuse. Its serialized descriptors are read as text, HTTP and
gogo options are dropped, and protoc makes new code. Generated code must be older than the runtime, so:
    python3 -m venv ENV && ENV/bin/pip install 'grpcio-tools==1.66.2' 'setuptools<80'
    ENV/bin/python scripts/gen_etcd_stubs.py PATH_OF_THE_INSTALLED_etcd3_PACKAGE
"""

from __future__ import annotations

import ast
import sys
import tempfile
from pathlib import Path

from google.protobuf import descriptor_pb2
from grpc_tools import protoc

HOME = "xllm_py/registry/etcd_stubs"
NAMES = ("kv", "auth", "rpc")


def descriptor(package: Path, name: str) -> descriptor_pb2.FileDescriptorProto:
    """The file descriptor inside an old generated module, moved to our folder and stripped of options."""
    text = (package / "etcdrpc" / f"{name}_pb2.py").read_text()
    start = text.index("serialized_pb=_b(") + len("serialized_pb=_b(")
    tree = ast.parse(text[start : text.index("\n", start)].rsplit(")", 1)[0].strip(), mode="eval")
    raw = ast.literal_eval(tree).encode("latin1")
    made = descriptor_pb2.FileDescriptorProto.FromString(raw)
    made.name = f"{HOME}/{name}.proto"
    kept = [dep for dep in made.dependency if dep.rpartition("/")[2] in {"kv.proto", "auth.proto"}]
    del made.dependency[:]
    made.dependency.extend(f"{HOME}/{dep.rpartition('/')[2]}" for dep in kept)
    made.ClearField("options")
    for message in made.message_type:
        message.ClearField("options")
        for field in message.field:
            if not field.options.HasField("packed"):
                field.ClearField("options")
    for service in made.service:
        for method in service.method:
            method.ClearField("options")
    return made


def main() -> int:
    """Write the stubs."""
    package = Path(sys.argv[1])
    files = descriptor_pb2.FileDescriptorSet(file=[descriptor(package, name) for name in NAMES])
    with tempfile.NamedTemporaryFile(suffix=".bin") as out:
        out.write(files.SerializeToString())
        out.flush()
        words = [
            "protoc",
            f"--descriptor_set_in={out.name}",
            "--python_out=.",
            "--pyi_out=.",
            "--grpc_python_out=.",
        ]
        code: int = protoc.main([*words, *(file.name for file in files.file)])
    for name in ("kv", "auth"):  # no services in them
        Path(f"{HOME}/{name}_pb2_grpc.py").unlink(missing_ok=True)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
