#!/usr/bin/env python3
"""Makes the images that the CRI validation suite pulls: stand-ins of ours under the suite's names,
from the fixture images, as the suite's own registries need not be reachable.

usage: images.py DIRECTORY NAME=LAYOUT...     (fixture images busybox and nginx as OCI layouts)

DIRECTORY gets `blobs/sha256/*` and `names.json`: manifest digests by `repository:tag`.
"""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
LAYER = "application/vnd.oci.image.layer.v1.tar"
E2E = "e2e-test-images"
CRI_TOOLS = "k8s-staging-cri-tools"

PASSWD = """\
root:x:0:0:root:/root:/bin/sh
www-data:x:33:33:www-data:/var/www:/bin/false
default-user:x:1000:1000::/:/bin/sh
nobody:x:65534:65534:nobody:/:/bin/false
"""
GROUP = """\
root:x:0:
www-data:x:33:
users:x:100:
default-user:x:1000:
group-defined-in-image:x:50000:default-user
nobody:x:65534:
"""
# What Debian's busybox has no applets for.
PGREP = """\
#!/bin/sh
for process in /proc/[0-9]*; do
    [ "$(cat "$process/comm" 2>/dev/null)" = "$1" ] && echo "${process#/proc/}"
done
"""
IPCS = """\
#!/bin/sh
sed 1d /proc/sysvipc/shm
"""
# The port that the suite expects of its image for pods in the host's network.
HOST_NETWORK_PORT = 12003


def layer(files):
    """A tar archive of files: mode and content by path."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for path, (mode, content) in sorted(files.items()):
            entry = tarfile.TarInfo(path)
            entry.mode, entry.size = mode, len(content)
            tar.addfile(entry, io.BytesIO(content))
    return out.getvalue()


def blob_of(layout, descriptor):
    """What a descriptor in an image layout stands for."""
    return (layout / "blobs" / descriptor["digest"].replace(":", "/")).read_bytes()


def manifest_of(layout):
    """The manifest of the one image in a layout."""
    index = json.loads((layout / "index.json").read_bytes())
    return json.loads(blob_of(layout, index["manifests"][0]))


def file_of(layout, path):
    """A file in an image's first layer."""
    first = io.BytesIO(blob_of(layout, manifest_of(layout)["layers"][0]))
    with tarfile.open(fileobj=first) as tar:
        return tar.extractfile(path).read()


class Registry:
    """Content by digest, and names."""

    def __init__(self, directory):
        self.blobs = directory / "blobs/sha256"
        self.names = {}
        shutil.rmtree(directory, ignore_errors=True)
        self.blobs.mkdir(parents=True)

    def store(self, content):
        digest = hashlib.sha256(content).hexdigest()
        (self.blobs / digest).write_bytes(content)
        return {"digest": f"sha256:{digest}", "size": len(content)}

    def add(self, layout, names, files=None, config=None):
        """An image like the one in `layout`, with more files and other settings."""
        manifest = manifest_of(layout)
        image = json.loads(blob_of(layout, manifest["config"]))
        for descriptor in manifest["layers"]:
            self.store(blob_of(layout, descriptor))
        if files:
            stored = self.store(layer(files))
            manifest["layers"].append({"mediaType": LAYER, **stored})
            image["rootfs"]["diff_ids"].append(stored["digest"])
            # One entry for each layer, where there are any.
            image.pop("history", None)
        image.setdefault("config", {}).update(config or {})
        manifest["config"] |= self.store(json.dumps(image).encode())
        stored = self.store(json.dumps(manifest).encode())
        for name in names:
            self.names[name] = stored["digest"]


def setuid_program(work):
    """What the suite's image for no-new-privs has: a program of root's that says who it is."""
    program = work / "nonewprivs"
    subprocess.run(["cc", "-static", "-Os", "-o", program, HERE / "nonewprivs.c"], check=True)
    return program.read_bytes()


def main():
    directory = Path(sys.argv[1])
    layouts = {name: Path(path) for name, path in (a.split("=", 1) for a in sys.argv[2:])}
    busybox, nginx = layouts["busybox"], layouts["nginx"]
    registry = Registry(directory)
    users = {"etc/passwd": (0o644, PASSWD.encode()), "etc/group": (0o644, GROUP.encode())}
    base = users | {
        "usr/bin/pgrep": (0o755, PGREP.encode()),
        "usr/bin/ipcs": (0o755, IPCS.encode()),
        # No link to busybox: the suite masks this path, and means this program alone.
        "usr/bin/ls": (0o755, file_of(busybox, "usr/bin/busybox")),
    }
    registry.add(busybox, [f"{E2E}/busybox:1.29-2"], base)
    registry.add(nginx, [f"{E2E}/nginx:1.14-2"])
    # The suite looks for the program's name in the log.
    registry.add(nginx, [f"{E2E}/httpd:2.4.39-4"],
                 config={"Cmd": ["sh", "-c", "echo httpd; exec nginx -g 'daemon off;'"]})
    registry.add(busybox, [f"{E2E}/nonewprivs:1.3"],
                 {"nonewprivs": (0o4755, setuid_program(directory))},
                 {"Entrypoint": ["/nonewprivs"], "Cmd": None})
    registry.add(busybox, [f"{CRI_TOOLS}/test-image-predefined-group:latest"], users,
                 {"User": "1000"})
    host_network = f"server {{ listen {HOST_NETWORK_PORT}; root /var/www/html; }}"
    conf = f"user www-data; pid /run/nginx.pid; events {{ }} http {{ {host_network} }}\n"
    registry.add(nginx, [f"{CRI_TOOLS}/hostnet-nginx-amd64:latest"],
                 {"etc/nginx/nginx.conf": (0o644, conf.encode())})
    # Each of the others is an image of its own, by a file with its name.
    for name, settings in {
        "test-image-latest:latest": {},
        "test-image-tag:test": {},
        "test-image-1:latest": {},
        "test-image-2:latest": {},
        "test-image-3:latest": {},
        "test-image-tags:1": {},
        "test-image-user-uid:latest": {"User": "1002"},
        "test-image-user-username:latest": {"User": "www-data"},
        "test-image-user-uid-group:latest": {"User": "1003:users"},
        "test-image-user-username-group:latest": {"User": "www-data:100"},
        "pause:3.9": {},
    }.items():
        names = [name if name.startswith("pause") else f"{CRI_TOOLS}/{name}"]
        names += {"test-image-tag:test": [f"{CRI_TOOLS}/test-image-tag:all"],
                  "test-image-tags:1": [f"{CRI_TOOLS}/test-image-tags:{n}" for n in (2, 3)],
                  }.get(name, [])
        registry.add(busybox, names, users | {"this-image": (0o644, name.encode())}, settings)
    os.remove(directory / "nonewprivs")
    (directory / "names.json").write_text(json.dumps(registry.names, indent=1))


if __name__ == "__main__":
    main()
