"""The servers of `deploy/compose.yaml` on loopback: PostgreSQL, an S3 server, MLflow, Prefect.

The commands and settings of MLflow and Prefect are those of the file; only hosts, ports and
passwords are put in. PostgreSQL is Debian's; the S3 server is moto's, which speaks the protocol
over HTTP.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import yaml
from waiting import until

ROOT = Path(__file__).parent.parent.parent
COMPOSE = ROOT / "deploy" / "compose.yaml"
BIN = Path(sys.executable).parent
SECRETS = {
    "POSTGRES_PASSWORD": "postgres-secret",
    "S3_USER": "halfstep",
    "S3_PASSWORD": "s3-secret-of-tests",
    "MLFLOW_PASSWORD": "mlflow-secret-of-tests",
    "MLFLOW_SECRET": "flask-secret",
    "PREFECT_PASSWORD": "prefect-secret",
}


LOOPBACK_HOOKS = {
    "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http",
    "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
    "MLFLOW_WEBHOOK_CACHE_TTL": "1",
}
"""So that MLflow's webhooks reach a test."""


def postgres_programs():
    """The folder of Debian's server programs, or None."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return found[-1].parent if found else None


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(url, header=None):
    try:
        urllib.request.urlopen(urllib.request.Request(url, headers=header or {}), timeout=2)
    except urllib.error.HTTPError:
        return True  # somebody is there
    except OSError:
        return False
    return True


class Postgres:
    """A cluster of its own, as the user that Debian made for it."""

    def __init__(self, folder):
        self.port = free_port()
        self.data = folder / "postgres"
        self.data.mkdir()
        self.programs = postgres_programs()
        self.as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        if os.getuid() != 0:
            self.as_user = []
        else:
            shutil.chown(self.data, "postgres", "postgres")
            for parent in [folder, *folder.parents][:4]:
                parent.chmod(parent.stat().st_mode | 0o011)
        secret = folder / "secret"
        secret.write_text(SECRETS["POSTGRES_PASSWORD"])
        secret.chmod(0o644)
        self.run("initdb", "--username=halfstep", f"--pwfile={secret}", "--auth=scram-sha-256",
                 "--no-sync", "--encoding=UTF8", "--locale=C.UTF-8",
                 f"--pgdata={self.data}")  # fmt: skip
        self.start()
        names = re.findall(
            r"CREATE DATABASE (\w+);", (COMPOSE.parent / "databases.sql").read_text()
        )
        for name in ["mlflow", *names]:
            self.sql(f"CREATE DATABASE {name}", "postgres")

    def run(self, program, *arguments):
        done = subprocess.run(
            [*self.as_user, str(self.programs / program), *arguments],
            capture_output=True, text=True, check=False, cwd="/",
            env={"PGPASSWORD": SECRETS["POSTGRES_PASSWORD"], "PATH": os.environ["PATH"]},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    def start(self):
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -F"
        self.run("pg_ctl", "start", "--wait", f"--pgdata={self.data}", f"--options={options}",
                 f"--log={self.data}/log")  # fmt: skip

    def stop(self):
        self.run("pg_ctl", "stop", "--mode=fast", f"--pgdata={self.data}")

    def sql(self, command, database="mlflow"):
        return self.run("psql", "--host=127.0.0.1", f"--port={self.port}", "--username=halfstep",
                        f"--dbname={database}", "--tuples-only", "--no-align",
                        f"--command={command}")  # fmt: skip


class S3:
    """moto's server."""

    def __init__(self, folder):
        self.port, self.log = free_port(), folder / "s3.log"
        self.address = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self):
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [str(BIN / "moto_server"), "-H", "127.0.0.1", "-p", str(self.port)],
                stdout=log, stderr=log, env={**os.environ, "MOTO_S3_CUSTOM_ENDPOINTS": ""},
            )  # fmt: skip
        until(lambda: answers(self.address), self.process, log=self.log)
        request = urllib.request.Request(f"{self.address}/halfstep", method="PUT")
        urllib.request.urlopen(request, timeout=10)

    def stop(self):
        stop(self.process)


class Served:
    """A service of the compose file, as a process here."""

    def __init__(self, name, folder, put_in, probe, settings=None):
        service = yaml.safe_load(COMPOSE.read_text())["services"][name]
        self.name, self.log, self.folder = name, folder / f"{name}.log", folder
        self.port = put_in["PORT"]
        self.address = f"http://127.0.0.1:{self.port}"
        self._probe = f"{self.address}{probe}"

        def filled(text):
            text = re.sub(r"\$\{(\w+)\}", lambda m: SECRETS[m[1]], str(text))
            for old, new in put_in.items():
                text = text.replace(old, str(new))
            return text

        self.command = [filled(part) for part in service["command"]]
        self.command[0] = str(BIN / self.command[0])
        given = service.get("environment", {})
        self.settings = {key: filled(value) for key, value in given.items()} | (settings or {})
        self.start()

    def start(self):
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW", "PREFECT"))}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, cwd=self.folder, start_new_session=True,
                env={**clean, **self.settings, "PREFECT_HOME": str(self.folder / "prefect"),
                     "PREFECT_SERVER_LOGGING_LEVEL": "WARNING"},
            )  # fmt: skip
        until(lambda: answers(self._probe), self.process, log=self.log)

    def stop(self):
        stop(self.process)

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def stop(process):
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Team:
    """All of them, and what a client sets."""

    def __init__(self, folder):
        self.folder, self._started = folder, []
        self.postgres = self._keep(Postgres(folder))
        self.s3 = self._keep(S3(folder))
        ini = folder / "mlflow-auth.ini"
        text = (COMPOSE.parent / "mlflow-auth.ini").read_text()
        ini.write_text(text.replace("/var/lib/mlflow", str(folder)))
        common = {
            "0.0.0.0": "127.0.0.1",
            "postgres:5432": f"127.0.0.1:{self.postgres.port}",
            "http://s3:9000": self.s3.address,
            "/opt/halfstep/deploy/mlflow-auth.ini": ini,
        }
        port = free_port()
        ports = {"--port=5000": f"--port={port}", ":5000": f":{port}", "--workers=2": "--workers=1"}
        put_in = {**common, **ports, "PORT": port}
        self.mlflow = self._keep(Served("mlflow", folder, put_in, "/health", LOOPBACK_HOOKS))
        port = free_port()
        self.prefect = self._keep(
            Served("prefect", folder, {**common, "--port=4200": f"--port={port}", "PORT": port},
                   "/api/health")
        )  # fmt: skip

    def _keep(self, one):
        self._started.append(one)
        return one

    @property
    def client(self):
        """What a machine that runs halfstep sets."""
        return {
            "MLFLOW_TRACKING_URI": self.mlflow.address,
            "MLFLOW_TRACKING_USERNAME": "admin",
            "MLFLOW_TRACKING_PASSWORD": SECRETS["MLFLOW_PASSWORD"],
            "PREFECT_API_URL": f"{self.prefect.address}/api",
            "PREFECT_API_AUTH_STRING": f"admin:{SECRETS['PREFECT_PASSWORD']}",
            "PREFECT_HOME": str(self.folder / "prefect-client"),
        }

    @property
    def depot_access(self):
        """What a machine that reaches the depot sets."""
        return {
            "AWS_ACCESS_KEY_ID": SECRETS["S3_USER"],
            "AWS_SECRET_ACCESS_KEY": SECRETS["S3_PASSWORD"],
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.s3.address,
        }

    def stop(self):
        for one in reversed(self._started):
            one.stop()
