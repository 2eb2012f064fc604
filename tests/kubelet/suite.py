#!/usr/bin/env python3
"""A Kubernetes node: kubelet and API server beside containerd and our daemon (`cri --run`).

usage: suite.py PROGRAMS IMAGE [RUNTIME...]

PROGRAMS is a directory with `kubelet`, `kube-apiserver`, `etcd`, `kubectl` and `sa.key`, IMAGE an
archive with the fixture image of busybox. Pods name the node
they are for, so nothing schedules them; all else is as a cluster does it: RuntimeClasses, status by
the API, probes, volumes that change, resize in place, `kubectl exec`, `logs`, `port-forward`.
"""

import json
import os
import shutil
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

RUNTIMES = ["bulkhead-microvm", "bulkhead-app"]
NODE = "lab"
ADDRESS = "192.0.2.1"
API = "https://127.0.0.1:6443"
# Everything is emulated where there is no hardware KVM.
PATIENCE = 600
IMAGE = "localhost/bulkhead/busybox:latest"

NAMESPACE = "/api/v1/namespaces/default"
PODS = f"{NAMESPACE}/pods/"

MERGE = "application/merge-patch+json"
STRATEGIC = "application/strategic-merge-patch+json"

WORK = Path("/run/kubelet-test")
KUBECONFIG = WORK / "kubeconfig"


def say(text):
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


class Failed(Exception):
    """What was expected did not happen."""


def until(what, condition, patience=PATIENCE):
    """Waits for `condition` to give something; its last answer or error is in the failure."""
    end, last = time.monotonic() + patience, None
    while time.monotonic() < end:
        try:
            last = condition()
            if last:
                return last
        except (Failed, OSError, subprocess.SubprocessError, KeyError, IndexError, ValueError) as error:
            last = error
        time.sleep(1)
    raise Failed(f"{what}: not within {patience} s; last: {last!r}")


class Programs:
    """The programs of the cluster, ended with it."""

    def __init__(self, directory):
        self.directory, self.running = Path(directory), {}

    def start(self, name, *arguments):
        log = open(WORK / f"{name}.log", "ab")
        self.running[name] = subprocess.Popen(
            [self.directory / name, *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def stop(self, name):
        child = self.running.pop(name)
        child.kill()
        child.wait()

    def kubectl(self, *arguments, check=True):
        """What kubectl says on its standard output."""
        done = subprocess.run(
            [self.directory / "kubectl", "--kubeconfig", KUBECONFIG, "--request-timeout=120s", *arguments],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
        if check and done.returncode != 0:
            raise Failed(f"kubectl {' '.join(arguments)}: {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout if check else (done.returncode, done.stdout + done.stderr)

    def api(self, method, path, body=None, kind="application/json"):
        """An answer of the API server. Asking it costs an emulated host far less than kubectl does."""
        request = urllib.request.Request(
            API + path, method=method, data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": "Bearer token", "Content-Type": kind})
        # The server's certificate is one that it has made for itself.
        trust = ssl._create_unverified_context()
        try:
            with urllib.request.urlopen(request, timeout=120, context=trust) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise Failed(f"{method} {path}: {error.code}: {error.read().decode()}") from error
        return json.loads(text) if text.startswith(b"{") else text.decode()

    def get(self, kind, name):
        found = self.api("GET", {"node": "/api/v1/nodes/"}.get(kind, PODS) + name)
        if found is None:
            raise Failed(f"no {kind} {name}")
        return found

    def apply(self, *objects):
        for wanted in objects:
            kind = wanted["kind"].lower()
            path = {"runtimeclass": "/apis/node.k8s.io/v1/runtimeclasses", "pod": PODS,
                    "configmap": f"{NAMESPACE}/configmaps", "secret": f"{NAMESPACE}/secrets"}[kind]
            self.api("POST", path.rstrip("/"), wanted)

    def tail(self):
        """The last that each of them said."""
        for name in ("etcd", "kube-apiserver", "kubelet"):
            path = WORK / f"{name}.log"
            if path.exists():
                lines = path.read_text(errors="replace").splitlines()
                print(f"--- {name}\n" + "\n".join(line[:400] for line in lines[-60:]), flush=True)


def cluster(programs):
    """Starts API server and kubelet; the node is ready after it."""
    tools = WORK / "bin"
    tools.mkdir(parents=True, exist_ok=True)
    # kubelet mounts volumes by these, which a small system lacks.
    for name in ("mount", "umount"):
        if not shutil.which(name):
            (tools / name).symlink_to(shutil.which("busybox"))
    os.environ["PATH"] += f":{tools}"
    for command in (["ip", "link", "add", "node0", "type", "dummy"],
                    ["ip", "addr", "add", f"{ADDRESS}/24", "dev", "node0"],
                    ["ip", "link", "set", "node0", "up"],
                    ["ip", "route", "add", "default", "dev", "node0"]):
        subprocess.run(command, check=True)
    key = programs.directory / "sa.key"
    (WORK / "tokens.csv").write_text('token,admin,admin,"system:masters"\n')
    programs.start("etcd", "--data-dir", str(WORK / "etcd"), "--listen-client-urls",
                   "http://127.0.0.1:2379", "--advertise-client-urls", "http://127.0.0.1:2379",
                   "--listen-peer-urls", "http://127.0.0.1:2380", "--unsafe-no-fsync")
    programs.start(
        "kube-apiserver", "--etcd-servers=http://127.0.0.1:2379", "--secure-port=6443",
        "--bind-address=127.0.0.1", f"--advertise-address={ADDRESS}", f"--cert-dir={WORK}/certs",
        "--service-cluster-ip-range=10.96.0.0/16", "--endpoint-reconciler-type=none",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={key}", f"--service-account-signing-key-file={key}",
        f"--token-auth-file={WORK}/tokens.csv", "--authorization-mode=AlwaysAllow",
        "--kubelet-preferred-address-types=InternalIP", "--disable-admission-plugins=ServiceAccount", "--allow-privileged=true")
    KUBECONFIG.write_text(json.dumps({
        "apiVersion": "v1", "kind": "Config", "current-context": "lab",
        "clusters": [{"name": "lab", "cluster": {"server": API, "insecure-skip-tls-verify": True}}],
        "users": [{"name": "admin", "user": {"token": "token"}}],
        "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "admin"}}]}))
    until("the API server", lambda: programs.api("GET", "/readyz") == "ok")
    say("the API server answers")
    for name in RUNTIMES:
        programs.apply({"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass",
                        "metadata": {"name": name}, "handler": name})
    (WORK / "resolv.conf").write_text("nameserver 192.0.2.53\n")
    (WORK / "kubelet.yaml").write_text(json.dumps({
        "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
        "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
        "authorization": {"mode": "AlwaysAllow"},
        "cgroupDriver": "cgroupfs", "cgroupRoot": "/",
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "failSwapOn": False, "makeIPTablesUtilChains": False,
        "evictionHard": {"memory.available": "1Mi"}, "imageGCHighThresholdPercent": 100,
        "localStorageCapacityIsolation": False, "resolvConf": str(WORK / "resolv.conf"),
        "clusterDNS": ["10.96.0.10"], "clusterDomain": "cluster.local",
        "runtimeRequestTimeout": "10m", "syncFrequency": "10s"}))
    start_kubelet(programs)
    until("the node", lambda: any(
        c["type"] == "Ready" and c["status"] == "True"
        for c in programs.get("node", NODE)["status"]["conditions"]))
    say("the node is ready")


def start_kubelet(programs):
    programs.start("kubelet", f"--config={WORK}/kubelet.yaml", f"--kubeconfig={KUBECONFIG}",
                   f"--hostname-override={NODE}", f"--node-ip={ADDRESS}",
                   f"--root-dir={WORK}/kubelet", f"--cert-dir={WORK}/kubelet-certs", "--v=2")


def container(name, script, **more):
    return {"name": name, "image": IMAGE, "imagePullPolicy": "Never", "command": ["sh", "-c", script], **more}


def pod(name, runtime, containers, **spec):
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": name}},
            "spec": {"nodeName": NODE, "runtimeClassName": runtime, "automountServiceAccountToken": False,
                     "containers": containers, "terminationGracePeriodSeconds": 120, **spec}}


def status_of(programs, name, container_name):
    for found in programs.get("pod", name)["status"].get("containerStatuses", []):
        if found["name"] == container_name:
            return found
    raise Failed(f"{name} has no status of {container_name}")


def ready(programs, name):
    def is_ready():
        status = programs.get("pod", name)["status"]
        return any(c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions", []))
    try:
        until(f"pod {name} ready", is_ready)
    except Failed as error:
        raise Failed(f"{error}\n{programs.kubectl('describe', 'pod', name)}") from error


def gone(programs, name):
    programs.api("DELETE", PODS + name)
    until(f"pod {name} gone", lambda: programs.api("GET", PODS + name) is None)


def expect(what, seen, wanted):
    if seen != wanted:
        raise Failed(f"{what}: {seen!r}, not {wanted!r}")


# -- what is tried, for each runtime class --

def a_whole_pod(programs, runtime):
    """Init container, two containers on one localhost, volumes, probes, logs, exec, port-forward."""
    programs.apply(
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "settings"}, "data": {"colour": "red"}},
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "key"}, "stringData": {"word": "open"}})
    web = container(
        "web", "cat /init/made > /www/index.html; echo serving; exec httpd -f -p 8080 -h /www",
        volumeMounts=[{"name": "init", "mountPath": "/init"}, {"name": "www", "mountPath": "/www"}],
        readinessProbe={"httpGet": {"path": "/index.html", "port": 8080}, "periodSeconds": 5, "timeoutSeconds": 30},
        livenessProbe={"exec": {"command": ["true"]}, "periodSeconds": 20, "timeoutSeconds": 60,
                       "failureThreshold": 10},
        resources={"limits": {"memory": "64Mi", "cpu": "500m"}, "requests": {"memory": "32Mi", "cpu": "50m"}})
    side = container(
        "side", "trap 'echo bye; exit 0' TERM; echo side; while :; do sleep 1; done",
        env=[{"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
             {"name": "WORD", "valueFrom": {"secretKeyRef": {"name": "key", "key": "word"}}}],
        volumeMounts=[{"name": "settings", "mountPath": "/settings"}])
    name = "whole"
    programs.apply(pod(
        name, runtime, [web, side],
        initContainers=[container("init", "echo made by init > /init/made",
                                  volumeMounts=[{"name": "init", "mountPath": "/init"}])],
        volumes=[{"name": "init", "emptyDir": {}}, {"name": "www", "emptyDir": {"medium": "Memory"}},
                 {"name": "settings", "configMap": {"name": "settings"}}]))
    ready(programs, name)
    say("  the pod is ready")
    sh = lambda script: programs.kubectl("exec", name, "-c", "side", "--", "sh", "-c", script)
    expect("the page", sh("wget -qO- http://127.0.0.1:8080/").strip(), "made by init")
    expect("the pod's address", sh("wget -qO- http://$POD_IP:8080/").strip(), "made by init")
    expect("the secret", sh("echo $WORD").strip(), "open")
    expect("host name", sh("hostname").strip(), name)
    if "10.96.0.10" not in sh("cat /etc/resolv.conf"):
        raise Failed("resolv.conf lacks the cluster's server")
    code, text = programs.kubectl("exec", name, "-c", "side", "--", "sh", "-c", "exit 7", check=False)
    expect(f"exit code of exec ({text})", code, 7)
    expect("log of web", programs.kubectl("logs", name, "-c", "web"), "serving\n")
    expect("log of side", programs.kubectl("logs", name, "-c", "side"), "side\n")
    with urllib.request.urlopen(f"http://{programs.get('pod', name)['status']['podIP']}:8080/", timeout=60) as page:
        expect("the page from the node", page.read(), b"made by init\n")
    port_forward(programs, name)
    say("  exec, logs and port-forward")
    # A ConfigMap that changes is seen.
    programs.api("PATCH", f"{NAMESPACE}/configmaps/settings", {"data": {"colour": "blue"}}, MERGE)
    until("the changed ConfigMap", lambda: sh("cat /settings/colour").strip() == "blue")
    say("  a changed ConfigMap")
    summary(programs, name)
    say("  statistics")
    resize(programs, name, runtime)
    say("  a resize")
    for kind in ("configmaps/settings", "secrets/key"):
        programs.api("DELETE", f"{NAMESPACE}/{kind}")
    follow = subprocess.Popen([programs.directory / "kubectl", "--kubeconfig", KUBECONFIG, "logs", "-f", name,
                               "-c", "side"], stdout=subprocess.PIPE, text=True)
    gone(programs, name)
    expect("the last words", follow.communicate(timeout=PATIENCE)[0], "side\nbye\n")


def port_forward(programs, name):
    child = subprocess.Popen([programs.directory / "kubectl", "--kubeconfig", KUBECONFIG, "port-forward",
                              f"pod/{name}", "18080:8080"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        def page():
            with urllib.request.urlopen("http://127.0.0.1:18080/", timeout=60) as answer:
                return answer.read() == b"made by init\n"
        until("port-forward", page)
    finally:
        child.kill()
        child.wait()


def summary(programs, name):
    """What kubelet measures of the containers, as autoscalers and `kubectl top` see it. (Of the pod as a
    whole it asks a cgroup, in which there is nothing of a pod on threads of the daemon.)"""
    def figure(metric, container_name):
        wanted = f'{metric}{{container="{container_name}",namespace="default",pod="{name}"}}'
        [line] = [line for line in text.splitlines() if line.startswith(wanted)]
        return float(line.split()[1])

    def measured():
        nonlocal text
        text = programs.api("GET", f"/api/v1/nodes/{NODE}/proxy/metrics/resource")
        return all(figure(f"container_{what}", c) > 0 for c in ("web", "side")
                   for what in ("cpu_usage_seconds_total", "memory_working_set_bytes"))
    text = ""
    try:
        until("the pod's figures", measured)
    except Failed as error:
        ours = [line for line in text.splitlines() if name in line]
        raise Failed(f"{error}; of {ours}") from error


def resize(programs, name, runtime):
    """Resources changed in place: the container is not restarted."""
    before = status_of(programs, name, "web")
    # Memory of the app kernel's VMs does not grow.
    limits = {"cpu": "700m", "memory": "64Mi" if runtime == "bulkhead-app" else "96Mi"}
    programs.api("PATCH", f"{PODS}{name}/resize", {"spec": {"containers": [
        {"name": "web", "resources": {"limits": limits}}]}}, STRATEGIC)
    now = until("resize", lambda: (
        lambda s: s if s.get("resources", {}).get("limits") == limits else None)(
            status_of(programs, name, "web")))
    expect("restarts after a resize", now["restartCount"], before["restartCount"])


def ends_of_containers(programs, runtime):
    """Exit codes, restarts, messages, and what ran out of memory."""
    programs.apply(pod("job", runtime, [
        container("good", "echo done > /dev/termination-log"),
        container("bad", "echo no > /dev/termination-log; exit 3"),
        container("hungry", "x=x; while :; do x=$x$x$x$x; done",
                  resources={"limits": {"memory": "32Mi"}})], restartPolicy="Never"))
    until("the job", lambda: programs.get("pod", "job")["status"]["phase"] == "Failed")
    ends = {n: status_of(programs, "job", n)["state"]["terminated"] for n in ("good", "bad", "hungry")}
    expect("good", (ends["good"]["exitCode"], ends["good"]["message"].strip()), (0, "done"))
    expect("bad", (ends["bad"]["exitCode"], ends["bad"]["message"].strip()), (3, "no"))
    expect("hungry", (ends["hungry"]["exitCode"], ends["hungry"]["reason"]), (137, "OOMKilled"))
    gone(programs, "job")
    programs.apply(pod("again", runtime, [
        container("c", "sleep 3; exit 1"),
        container("sick", "sleep 100000", livenessProbe={
            "exec": {"command": ["false"]}, "initialDelaySeconds": 5, "periodSeconds": 5, "failureThreshold": 1},
            terminationMessagePolicy="FallbackToLogsOnError")], terminationGracePeriodSeconds=1))
    until("restarts", lambda: status_of(programs, "again", "c")["restartCount"] > 0
          and status_of(programs, "again", "sick")["restartCount"] > 0)
    gone(programs, "again")


def kubelet_restarts(programs, runtime):
    """Pods do not notice; kubelet finds them again."""
    programs.apply(pod("stays", runtime, [container("c", "date +%s%N > /tmp/started; sleep 100000")]))
    ready(programs, "stays")
    started = programs.kubectl("exec", "stays", "--", "cat", "/tmp/started")
    programs.stop("kubelet")
    start_kubelet(programs)
    until("the same container", lambda: programs.kubectl("exec", "stays", "--", "cat", "/tmp/started") == started)
    expect("restarts", status_of(programs, "stays", "c")["restartCount"], 0)
    code, text = programs.kubectl("debug", "stays", "--image", IMAGE, "--image-pull-policy=Never",
                                  "--container", "eyes", "--target", "c", "--", "sh", "-c",
                                  "echo seen; sleep 100000", check=False)
    expect(f"kubectl debug ({text})", code, 0)
    until("the ephemeral container", lambda: programs.kubectl("logs", "stays", "-c", "eyes") == "seen\n")
    gone(programs, "stays")


def nothing_is_left(programs, _runtime):
    """No VM, no cgroup of a pod."""
    def left():
        pods = [p for p in Path("/sys/fs/cgroup").glob("kubepods/**/pod*") if p.is_dir()]
        # Directories of pods are named by their ids.
        ours = [p for p in Path("/run/bulkhead").glob("*/*") if len(p.name) == 64]
        if pods or ours:
            raise Failed(f"left: {pods} {ours}")
        return True
    until("an empty node", left)


TESTS = [a_whole_pod, ends_of_containers, kubelet_restarts, nothing_is_left]


def main():
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    programs = Programs(sys.argv[1])
    subprocess.run(["ctr", "--namespace", "k8s.io", "images", "import", "--all-platforms", sys.argv[2]],
                   check=True, stdout=subprocess.DEVNULL)
    passed, failed = 0, []
    try:
        cluster(programs)
        for runtime in sys.argv[3:] or RUNTIMES:
            for test in TESTS:
                begin, name = time.monotonic(), f"{runtime}::{test.__name__}"
                try:
                    test(programs, runtime)
                    say(f"test {name} ... ok ({time.monotonic() - begin:.0f} s)")
                    passed += 1
                except (Failed, OSError, subprocess.SubprocessError, LookupError, ValueError) as error:
                    say(f"test {name} ... FAILED ({time.monotonic() - begin:.0f} s)\n{error}")
                    failed.append(name)
                    programs.tail()
                    for path in (PODS.rstrip("/"), f"{NAMESPACE}/configmaps", f"{NAMESPACE}/secrets"):
                        programs.api("DELETE", path)
    except Failed as error:
        say(f"the cluster does not start: {error}")
        programs.tail()
        failed.append("cluster")
    finally:
        for name in list(programs.running)[::-1]:
            programs.stop(name)
    print(f"test result: {'FAILED' if failed else 'ok'}. {passed} passed; {len(failed)} failed; 0 ignored")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
