"""The listening socket, and HTTP's outer limits."""

import errno
import socket

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ..engine.errors import ConfigError

_BACKLOG = 2048
MAX_HEAD_BYTES = 64 << 10  # request line and headers


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens, so that nobody else can take the port. Errors: ConfigError naming the option."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {host}: not an address of this machine ({error})") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise ConfigError(_why_not(host, port, error)) from error
    return listener


def _why_not(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"--port {port} is in use on {host}; stop what listens there, or choose another --port"
    if error.errno == errno.EACCES:
        return f"--port {port} needs rights this process lacks; choose one above 1023"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"--host {host} is not an address of this machine; use 127.0.0.1 or 0.0.0.0"
    return f"--host {host} --port {port}: {error.strerror or error}"


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1, which stores headers of any size, with a limit on them."""

    _in_head = False
    _head_bytes = 0

    def data_received(self, data: bytes) -> None:
        """Bytes from the client. Only those that come while a head is unfinished count."""
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response("The request's headers are too large.")

    def on_message_begin(self) -> None:
        """A new request."""
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0

    def on_headers_complete(self) -> None:
        """What follows is a body, which the routes limit."""
        super().on_headers_complete()
        self._in_head = False
