"""Make the certificates and keys of a control plane for tests, with the openssl command.

One authority signs everything; P-256 keys, since one takes 10 ms.
"""

from __future__ import annotations

import base64
import ssl
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_DAYS = "30"
_TIMEOUT = 30.0


class _Socket(ssl.SSLSocket):
    """Closed where the client has gone before TLS began: Python leaves it open then, to nobody."""

    def getpeername(self) -> Any:
        try:
            return super().getpeername()
        except OSError:
            self.close()
            raise ConnectionResetError from None


class Authority:
    """A certificate authority in `folder`; what it signs is kept there and made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.certificate = folder / "ca.crt"
        self._key = folder / "ca.key"
        if not self.certificate.exists():
            self._new_key(self._key)
            usage = ["basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign,cRLSign,digitalSignature"]
            extensions = [part for text in usage for part in ("-addext", text)]
            subject = ["-subj", "/CN=ovsmesh test authority", "-days", _DAYS]
            _openssl(
                "req", "-x509", "-new", "-key", str(self._key), "-out", str(self.certificate), *subject, *extensions
            )

    def sign(self, name: str, subject: str, alternatives: str = "") -> tuple[Path, Path]:
        """Certificate and key for `subject` ("/O=group/CN=user"), good for both ends of a connection."""
        certificate, key = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        if certificate.exists():
            return certificate, key
        self._new_key(key)
        request = self.folder / f"{name}.csr"
        _openssl("req", "-new", "-key", str(key), "-subj", subject, "-out", str(request))
        extensions = self.folder / f"{name}.ext"
        names = f"subjectAltName={alternatives}\n" if alternatives else ""
        extensions.write_text(f"extendedKeyUsage=serverAuth,clientAuth\n{names}")
        by = ["-CA", str(self.certificate), "-CAkey", str(self._key), "-CAcreateserial", "-days", _DAYS]
        what = ["-in", str(request), "-extfile", str(extensions), "-out", str(certificate)]
        _openssl("x509", "-req", *what, *by)
        return certificate, key

    def server(self, name: str, address: str) -> ssl.SSLContext:
        """What a server for tests at this address ends TLS with."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.sslsocket_class = _Socket
        context.load_cert_chain(*self.sign(name, f"/CN={name}", f"IP:{address}"))
        return context

    def token_keys(self) -> tuple[Path, Path]:
        """Private and public key that service account tokens are signed with."""
        private, public = self.folder / "sa.key", self.folder / "sa.pub"
        if not public.exists():
            self._new_key(private)
            _openssl("ec", "-in", str(private), "-pubout", "-out", str(public))
        return private, public

    def _new_key(self, path: Path) -> None:
        _openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(path))


def _openssl(*arguments: str) -> None:
    done = subprocess.run(["openssl", *arguments], capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    if done.returncode:
        raise AssertionError(f"openssl {' '.join(arguments)}: {done.stderr}")


def kubeconfig(server: str, authority: Path, user: dict[str, Any], inline: bool = False) -> dict[str, object]:
    """A kubeconfig for one user. With `inline` the authority's certificate is in it, not its path."""
    cluster = {"server": server, "certificate-authority": str(authority)}
    if inline:
        data = base64.b64encode(authority.read_bytes()).decode()
        cluster = {"server": server, "certificate-authority-data": data}
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "test", "cluster": cluster}],
        "users": [{"name": "test", "user": user}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        "current-context": "test",
    }


def subject(user: str, groups: Sequence[str]) -> str:
    """The subject that Kubernetes reads as this user in these groups."""
    return "".join(f"/O={group}" for group in groups) + f"/CN={user}"
