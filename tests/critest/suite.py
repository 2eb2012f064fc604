#!/usr/bin/env python3
"""Runs the CRI validation suite on a node (`cri --run`, which names its directory in BULKHEAD_NODE).

usage: suite.py CRITEST IMAGES REPORTS [FOCUS]

Images come from a registry served here, with what images.py made. Specs in `excluded` are left out;
without a FOCUS every other one has to pass, or to be skipped by the suite itself.
"""

import argparse
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOCKET = "unix:///run/containerd/containerd.sock"
# Plugins of containerd's that watch and change pods; some specs are such a plugin.
NRI = Path("/var/run/nri/nri.sock")
# Where the suite looks for images; all are the same registry here.
HOSTS = ["registry.k8s.io", "k8s.gcr.io", "gcr.io"]
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
# A spec takes half a minute on an emulated host, and there are 137.
TIMEOUT = "5h"


def excluded():
    """Names of the specs that cannot pass, each with its reason after a tab."""
    lines = (HERE / "excluded").read_text().splitlines()
    return dict(line.split("\t", 1) for line in lines if line and not line.startswith("#"))


def skip(name):
    """The option that leaves a spec out. (`re.escape` writes what Go does not read.)"""
    literal = re.sub(r"[][.()|*+?^$\\{}]", r"\\\g<0>", name)
    return f"-ginkgo.skip={literal}$"


class Registry(http.server.BaseHTTPRequestHandler):
    """The part of the distribution protocol that a pull needs."""

    protocol_version = "HTTP/1.1"
    images = Path()
    names = {}

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def find(self):
        """Digest and media type of what is asked for."""
        asked = re.fullmatch(r"/v2/(.+)/(manifests|blobs)/([^/?]+)(\?.*)?", self.path)
        if not asked:
            return None, None
        repository, kind, reference = asked[1], asked[2], asked[3]
        if kind == "blobs":
            return reference, "application/octet-stream"
        return self.names.get(f"{repository}:{reference}", reference), MANIFEST

    def answer(self, with_body):
        digest, media_type = self.find()
        if self.path.rstrip("/") == "/v2":
            body, media_type = b"{}", "application/json"
        elif digest and re.fullmatch("sha256:[0-9a-f]{64}", digest):
            path = self.images / "blobs" / digest.replace(":", "/")
            body = path.read_bytes() if path.exists() else None
        else:
            body = None
        self.send_response(404 if body is None else 200)
        self.send_header("Content-Length", str(len(body or b"")))
        if body is not None:
            self.send_header("Content-Type", media_type)
            if digest:
                self.send_header("Docker-Content-Digest", digest)
        self.end_headers()
        if with_body and body:
            self.wfile.write(body)


def serve(images, certs):
    """Starts the registry and tells containerd of it."""
    Registry.images = images
    Registry.names = json.loads((images / "names.json").read_text())
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Registry)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    for host in HOSTS:
        (certs / host).mkdir(parents=True, exist_ok=True)
        (certs / host / "hosts.toml").write_text(
            f'server = "{address}"\n[host."{address}"]\n  capabilities = ["pull", "resolve"]\n')


def summary(report, focus):
    """Prints what became of each spec; whether none failed."""
    specs = [spec for spec in json.loads(report.read_text())[0]["SpecReports"]
             if spec["LeafNodeType"] == "It"]
    by_state = {}
    for spec in specs:
        name = " ".join([*spec["ContainerHierarchyTexts"], spec["LeafNodeText"]])
        reason = spec.get("Failure", {}).get("Message", "").strip().splitlines()
        state = spec["State"]
        if state == "skipped" and not reason:
            state = "left out"
        by_state.setdefault(state, []).append((name, reason))
    for state, found in by_state.items():
        if state in ("passed", "left out"):
            continue
        for name, reason in found:
            print(f"{state}: {name}: {reason[0] if reason else 'no reason given'}")
    for name, reason in excluded().items():
        print(f"excluded: {name}: {reason}")
    count = {state: len(found) for state, found in by_state.items()}
    passed, skipped = count.pop("passed", 0), count.pop("skipped", 0)
    left_out = count.pop("left out", 0)
    # Everything else is a failure: failed, panicked, timed out, interrupted.
    failed = sum(count.values())
    print(f"{len(specs)} specs: {passed} passed, {failed} failed, {skipped} skipped by the suite "
          f"itself, {left_out} {'not asked for' if focus else 'excluded'}")
    print(f"test result: {'FAILED' if failed else 'ok'}. {passed} passed; {failed} failed; "
          f"{skipped} ignored; 0 measured; {left_out} filtered out")
    return failed == 0 and passed > 0


def main():
    options = argparse.ArgumentParser(usage=__doc__)
    for name in ("critest", "images", "reports"):
        options.add_argument(name, type=Path)
    options.add_argument("focus", nargs="?", default="")
    args = options.parse_args()
    serve(args.images, Path(os.environ["BULKHEAD_NODE"]) / "certs.d")
    args.reports.mkdir(parents=True, exist_ok=True)
    report = args.reports / "report.json"
    report.unlink(missing_ok=True)
    command = [args.critest, "-runtime-endpoint", SOCKET, "-image-endpoint", SOCKET,
               "-ginkgo.no-color", "-ginkgo.v", f"-ginkgo.timeout={TIMEOUT}",
               f"-ginkgo.json-report={report}"]
    if NRI.exists():
        command += ["-nri-socket", NRI]
    command += map(skip, excluded())
    if args.focus:
        command.append(f"-ginkgo.focus={args.focus}")
    ended = subprocess.run(command, check=False).returncode
    if not report.exists():
        sys.exit(f"error: critest ended with {ended} and left no report")
    sys.exit(0 if summary(report, args.focus) else 1)


if __name__ == "__main__":
    main()
