# SPDX-License-Identifier: Apache-2.0
"""The lab's cached parts: emulator, kernel, root, init, initramfs.

Each lives in <cache>/lab/<part>-<hash>, the hash being over everything that decides its content:
the package lists and options here, the text of the function that makes it, and the hashes of the
parts it is made from. Package versions are what the mirror has on the day; they are recorded in
the part's `manifest` file.
"""

import contextlib
import fcntl
import hashlib
import inspect
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Callable

from .common import LAB_DIR, LabError, cache_dir, say

# The emulator: see README.md on stability before changing the suite.
QEMU_SUITES = {
    "10.0": ["bookworm-backports", "bookworm"],
    "10.0-stable": ["trixie"],
    "11": ["forky"],
}
QEMU_DEFAULT = "11"

KERNEL_SUITE = "trixie"
KERNEL_PACKAGE = r"linux-image-6\.12\.[0-9.+a-z]*-cloud-amd64"
# Loaded at boot, in the initramfs. The others are found by modprobe.
KERNEL_MODULES = """
    overlay kvm kvm-amd vhost_vsock vhost_net tun erofs virtio_blk nbd loop
    act_mirred act_gact sch_ingress cls_u32 cls_matchall cls_flower veth bridge br_netfilter
    nf_tables nft_compat nft_ct nft_nat nft_masq nft_chain_nat nf_conntrack
    xt_comment xt_conntrack xt_MASQUERADE xt_mark xt_addrtype xt_multiport xt_nat
""".split()

ROOT_SUITE = "forky"
ROOT_PACKAGES = """
    busybox-static ca-certificates containerd containernetworking-plugins cpio crun curl e2fsprogs
    erofs-utils expect gdb-minimal iproute2 iptables iputils-ping jq kmod netcat-openbsd nftables
    procps psmisc python3-minimal qemu-system-x86 runc socat strace util-linux virtiofsd
""".split()


# Needed to make the parts; the packages are in the file `prereqs`.
TOOLS = "apt-get cc depmod dpkg-deb dpkg-query mmdebstrap rustc xz zstd".split()


def mirror() -> tuple[str, str]:
    """The machine's own Debian mirror and keyring, from its apt configuration."""
    override = os.environ.get("BULKHEAD_DEBIAN_MIRROR")
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
    if not os.path.exists(keyring):
        raise LabError(f"{keyring} is missing: apt-get install debian-archive-keyring")
    if override:
        return override, keyring
    env = {k: v for k, v in os.environ.items() if k != "APT_CONFIG"}
    out = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(ORIGIN)|$(LABEL)|$(REPO_URI)",
         "Created-By: Packages"], env=env, capture_output=True, text=True, check=False).stdout
    for line in out.splitlines():
        origin, label, uri = line.split("|")[:3]
        if origin == label == "Debian":
            return uri, keyring
    raise LabError("no Debian mirror in this machine's apt configuration (is `apt-get update` "
                   "done?): configure one, or name it in BULKHEAD_DEBIAN_MIRROR")


def run(cmd: list[str], log: Path, **kwargs: object) -> None:
    """Runs a command with its output in the log; the error shows the end of it."""
    with open(log, "ab") as f:
        f.write(f"$ {' '.join(cmd)}\n".encode())
        f.flush()
        rc = subprocess.run(cmd, stdin=subprocess.DEVNULL, stdout=f, stderr=f, check=False,
                            **kwargs).returncode  # type: ignore[call-overload]
    if rc != 0:
        tail = "\n  ".join(log.read_text(errors="replace").splitlines()[-15:])
        raise LabError(f"{cmd[0]} failed with {rc}:\n  {tail}")


class PrivateApt:
    """apt with sources, state and cache of its own; the machine's configuration stays as it is."""

    def __init__(self, where: Path, suites: list[str], log: Path) -> None:
        uri, keyring = mirror()
        self.dir, self.log = where, log
        self.archives = where / "cache/archives"
        for d in ["state/lists/partial", "cache/archives/partial", "etc"]:
            (where / d).mkdir(parents=True)
        (where / "status").touch()
        (where / "etc/sources.list").write_text("".join(
            f"deb [signed-by={keyring}] {uri} {suite} main\n" for suite in suites))
        settings = {
            "Dir::State": where / "state", "Dir::State::status": where / "status",
            "Dir::Cache": where / "cache",
            "Dir::Etc::sourcelist": where / "etc/sources.list",
            "Dir::Etc::sourceparts": "/dev/null", "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
            # testing suites carry a date after which apt would refuse a frozen mirror
            "Acquire::Check-Valid-Until": "false", "Acquire::Languages": "none",
            "Acquire::Retries": "3", "APT::Install-Recommends": "false",
            "APT::Sandbox::User": "root", "APT::Architecture": "amd64",
        }
        conf = where / "apt.conf"
        conf.write_text("".join(f'{k} "{v}";\n' for k, v in settings.items()))
        self.env = dict(os.environ, APT_CONFIG=str(conf))
        run(["apt-get", "update"], log, env=self.env)

    def output(self, *cmd: str) -> str:
        return subprocess.run(cmd, env=self.env, capture_output=True, text=True,
                              check=True).stdout

    def unpack(self, dest: Path, packages: list[str], suite: str, closure: bool) -> list[str]:
        """Downloads packages (with all they depend on) and unpacks them; returns their names."""
        dest.mkdir(parents=True, exist_ok=True)
        if closure:
            run(["apt-get", "install", "-y", "--download-only", "-t", suite, *packages],
                self.log, env=self.env)
        else:
            run(["apt-get", "download", "-t", suite, *packages], self.log, env=self.env,
                cwd=self.archives)
        debs = sorted(self.archives.glob("*.deb"))
        for deb in debs:
            run(["dpkg-deb", "-x", str(deb), str(dest)], self.log)
            deb.unlink()
        return [d.name for d in debs]


# --- the parts ---------------------------------------------------------------------------------

def make_qemu(out: Path, work: Path, log: Path, suites: list[str]) -> None:
    """QEMU with every library it needs, libc included: runs on any distribution."""
    apt = PrivateApt(work / "apt", suites, log)
    names = apt.unpack(out, ["qemu-system-x86", "libc6"], suites[0], closure=True)
    for unused in ["usr/share/doc", "usr/share/man", "usr/share/locale", "usr/lib/systemd"]:
        shutil.rmtree(out / unused, ignore_errors=True)
    (out / "manifest").write_text("\n".join(names) + "\n")


def make_kernel(out: Path, work: Path, log: Path, suite: str, package: str) -> None:
    """Debian's cloud kernel: an uncompressed vmlinux and uncompressed modules.

    Unpacking is done once here rather than by the emulated CPU at every start.
    """
    apt = PrivateApt(work / "apt", [suite], log)
    names = [n for n in apt.output("apt-cache", "pkgnames").split() if re.fullmatch(package, n)]
    if not names:
        raise LabError(f"no package {package} in {suite}")

    def version(name: str) -> list[int]:
        return [int(x) for x in re.findall(r"\d+", name)]
    debs = apt.unpack(work / "deb", [max(names, key=version)], suite, closure=False)
    image = next((work / "deb/boot").glob("vmlinuz-*"))
    release = image.name.removeprefix("vmlinuz-")
    (out / "vmlinux").write_bytes(extract_vmlinux(image))
    # dpkg-deb leaves /lib/modules below usr in newer packages, below lib in older ones
    found = [d for d in (work / "deb/usr/lib/modules", work / "deb/lib/modules") if d.is_dir()]
    shutil.copytree(found[0], out / "usr/lib/modules", symlinks=True)
    (out / "lib").symlink_to("usr/lib")
    compressed = [str(p) for p in (out / "usr/lib/modules").rglob("*.ko.xz")]
    for i in range(0, len(compressed), 200):
        run(["xz", "-d", *compressed[i:i + 200]], log)
    run(["/sbin/depmod", "-b", str(out), release], log)
    (out / "release").write_text(release)
    (out / "manifest").write_text("\n".join(debs) + "\n")


def extract_vmlinux(image: Path) -> bytes:
    """The ELF kernel inside a bzImage, by the header of the x86 boot protocol (2.08 and later)."""
    raw = image.read_bytes()
    if raw[0x202:0x206] != b"HdrS":
        raise LabError(f"{image.name} is not a bzImage")
    setup = (raw[0x1F1] or 4) + 1
    offset = setup * 512 + int.from_bytes(raw[0x248:0x24C], "little")
    payload = raw[offset:offset + int.from_bytes(raw[0x24C:0x250], "little")]
    for magic, cmd in ((b"\x28\xb5\x2f\xfd", ["zstd", "-dcq"]), (b"\xfd7zXZ", ["xz", "-dcq"]),
                       (b"\x1f\x8b", ["gzip", "-dcq"])):
        if payload.startswith(magic):
            # The payload ends with the unpacked size, which the tools take for garbage.
            elf = subprocess.run(cmd, input=payload[:-4], capture_output=True, check=False).stdout
            if elf.startswith(b"\x7fELF"):
                return elf
    raise LabError(f"{image.name}: unknown kernel compression")


def make_root(out: Path, work: Path, log: Path, suite: str, packages: list[str]) -> None:
    """The root file system of the lab's host."""
    uri, keyring = mirror()
    if os.geteuid() != 0:
        raise LabError("making the root file system needs root (mmdebstrap --mode=root): "
                       "run `lab prepare` as root once")
    nodoc = [f"--dpkgopt=path-exclude=/usr/share/{d}/*" for d in ("man", "doc", "locale", "info")]
    run(["mmdebstrap", "--variant=essential", "--mode=root",
         '--aptopt=Acquire::Check-Valid-Until "false"', '--aptopt=APT::Install-Recommends "false"',
         "--aptopt=Acquire::Retries \"3\"", *nodoc, f"--include={','.join(packages)}",
         suite, str(out / "tree"), f"deb [signed-by={keyring}] {uri} {suite} main"], log,
        env=dict(os.environ, TMPDIR=str(work)))
    names = subprocess.run(
        ["dpkg-query", f"--admindir={out}/tree/var/lib/dpkg", "-W",
         "-f", "${Package}_${Version}\n"], capture_output=True, text=True, check=True).stdout
    (out / "manifest").write_text(names)


def make_init(out: Path, work: Path, log: Path) -> None:
    """The static PID 1."""
    run(["rustc", "--edition=2024", "-Copt-level=s", "-Cpanic=abort", "-Cstrip=symbols",
         "-Ctarget-feature=+crt-static", "-o", str(out / "init"), str(LAB_DIR / "init/main.rs")],
        log, cwd=LAB_DIR)


def make_initramfs(out: Path, work: Path, log: Path, init: Path, kernel: Path,
                   modules: list[str], params: dict[str, str]) -> None:
    """init, the modules it loads and their order, as an uncompressed newc archive."""
    tree = kernel / "usr/lib/modules" / (kernel / "release").read_text()
    depends, builtin = {}, set()
    for line in (tree / "modules.dep").read_text().splitlines():
        path, _, deps = line.partition(":")
        depends[Path(path).stem.replace("-", "_")] = [path, *deps.split()]
    for line in (tree / "modules.builtin").read_text().splitlines():
        builtin.add(Path(line).stem.replace("-", "_"))
    order: list[str] = []
    for name in modules:
        key = name.replace("-", "_")
        if key in depends:
            # modules.dep names the innermost dependency last
            order += [p for p in reversed(depends[key]) if p not in order]
        elif key not in builtin:
            raise LabError(f"the kernel has no module {name}")
    lines = [f"{Path(p).name} {params.get(Path(p).stem, '')}".strip() for p in order]
    with open(out / "initramfs.cpio", "wb") as f:
        cpio_entry(f, "dev", 0o040755, b"")
        # the kernel opens it for PID 1's stdio before anything is mounted
        cpio_entry(f, "dev/console", 0o020600, b"", rdev=(5, 1))
        cpio_entry(f, "modules", 0o040755, b"")
        cpio_entry(f, "init", 0o100755, (init / "init").read_bytes())
        cpio_entry(f, "modules/order", 0o100644, "\n".join(lines).encode())
        for path in order:
            cpio_entry(f, f"modules/{Path(path).name}", 0o100644, unsigned(tree / path))
        cpio_entry(f, "TRAILER!!!", 0, b"")


def unsigned(module: Path) -> bytes:
    """A module without its appended signature, which the emulated CPU would check at every start.

    Layout: signature, a 12-byte record whose last four bytes are the signature's length, a marker.
    """
    raw, marker = module.read_bytes(), b"~Module signature appended~\n"
    if not raw.endswith(marker):
        return raw
    end = len(raw) - len(marker) - 12
    return raw[:end - int.from_bytes(raw[end + 8:end + 12], "big")]


def cpio_entry(f, name: str, mode: int, data: bytes, rdev: tuple[int, int] = (0, 0)) -> None:
    """One file of a newc cpio archive."""
    fields = [0, mode, 0, 0, 1, 0, len(data), 0, 0, rdev[0], rdev[1], len(name) + 1, 0]
    head = b"070701" + "".join(f"{n:08x}" for n in fields).encode() + name.encode() + b"\0"
    f.write(head + b"\0" * (-len(head) % 4) + data + b"\0" * (-len(data) % 4))


def module_params() -> dict[str, str]:
    """Module parameters to experiment with: BULKHEAD_LAB_MODPARAMS=kvm-amd:avic=0 vls=0,kvm:..."""
    text = os.environ.get("BULKHEAD_LAB_MODPARAMS", "")
    return dict(p.split(":", 1) for p in text.split(",") if ":" in p)


# --- the cache ---------------------------------------------------------------------------------

class Part:
    """One cached directory: how to make it, and the hash of all that goes into it."""

    def __init__(self, name: str, make: Callable[..., None], inputs: dict[str, object],
                 files: tuple[Path, ...] = (), about: str = "",
                 helpers: tuple[Callable[..., object], ...] = ()) -> None:
        self.name, self.make, self.inputs, self.about = name, make, inputs, about
        h = hashlib.sha256()
        for code in (make, *helpers):
            h.update(inspect.getsource(code).encode())
        # paths of other parts end in their hash, but begin with this machine's cache directory
        h.update(json.dumps({k: v.name if isinstance(v, Path) else v for k, v in inputs.items()},
                            sort_keys=True).encode())
        for path in files:
            h.update(path.read_bytes())
        self.dir = cache_dir() / "lab" / f"{name}-{h.hexdigest()[:16]}"

    @property
    def ready(self) -> bool:
        return (self.dir / "manifest.json").exists()

    def prepare(self, again: bool = False) -> None:
        """Makes the part unless it is there. Two labs may ask at the same time."""
        if self.ready and not again:
            return
        base = self.dir.parent
        base.mkdir(parents=True, exist_ok=True)
        with open(base / f".{self.name}.lock", "w", encoding="ascii") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.ready and not again:
                return
            start = time.monotonic()
            say(f"preparing {self.name}: {self.about} ...")
            tmp, work = base / f".{self.name}.new", base / f".{self.name}.work"
            log = base / f"{self.name}.log"
            for d in (tmp, work):  # left by an interrupted run
                shutil.rmtree(d, ignore_errors=True)
                d.mkdir()
            log.unlink(missing_ok=True)
            try:
                self.make(tmp, work, log, **self.inputs)
                (tmp / "manifest.json").write_text(json.dumps(
                    {"inputs": {k: str(v) for k, v in self.inputs.items()},
                     "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}, indent=1))
                if self.dir.exists():
                    self.dir.rename(work / "old")
                tmp.rename(self.dir)
            except OSError as e:
                raise LabError(f"cannot make part {self.name}: {e} (log: {log})") from e
            finally:
                shutil.rmtree(tmp, ignore_errors=True)
                shutil.rmtree(work, ignore_errors=True)
            say(f"preparing {self.name}: done in {time.monotonic() - start:.0f} s")


class Parts:
    """All parts of one configuration."""

    def __init__(self) -> None:
        flavour = os.environ.get("BULKHEAD_LAB_QEMU", QEMU_DEFAULT)
        if flavour not in QEMU_SUITES:
            raise LabError(f"BULKHEAD_LAB_QEMU={flavour}: choose one of {', '.join(QEMU_SUITES)}")
        suites = QEMU_SUITES[flavour]
        self.qemu = Part("qemu", make_qemu, {"suites": suites}, helpers=(PrivateApt,),
                         about=f"emulator from {suites[0]}, 45 MB")
        self.kernel = Part("kernel", make_kernel,
                           {"suite": KERNEL_SUITE, "package": KERNEL_PACKAGE},
                           helpers=(PrivateApt, extract_vmlinux),
                           about=f"6.12 cloud kernel from {KERNEL_SUITE}, 35 MB")
        self.root = Part("root", make_root, {"suite": ROOT_SUITE, "packages": ROOT_PACKAGES},
                         about=f"root file system from {ROOT_SUITE}, {len(ROOT_PACKAGES)} packages"
                               " and what they need, about 40 s")
        self.init = Part("init", make_init, {}, tuple(sorted((LAB_DIR / "init").glob("*.rs"))),
                         about="PID 1 of the lab")
        self.initramfs = Part(
            "initramfs", make_initramfs,
            {"init": self.init.dir, "kernel": self.kernel.dir, "modules": KERNEL_MODULES,
             "params": module_params()},
            about="initial file system", helpers=(unsigned, cpio_entry))
        self.all = [self.init, self.qemu, self.kernel, self.root, self.initramfs]

    def prepare(self, again: bool = False, only: list[Part] | None = None) -> None:
        """Makes what is missing (or everything) of all parts, or of some, in order."""
        wanted = self.all if only is None else only
        if again or not all(part.ready for part in wanted):
            path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
            missing = [t for t in TOOLS if not shutil.which(t, path=path)]
            if missing:
                raise LabError(f"not installed: {', '.join(missing)}; the Debian packages are "
                               f"listed in {LAB_DIR / 'prereqs'}")
        for part in wanted:
            part.prepare(again)

    def prune(self) -> int:
        """Removes parts that this checkout does not use; returns how many."""
        keep, count = {p.dir for p in self.all}, 0
        for d in (cache_dir() / "lab").glob("*-*"):
            if d.is_dir() and d not in keep:
                with contextlib.suppress(OSError):
                    shutil.rmtree(d)
                    count += 1
        return count
