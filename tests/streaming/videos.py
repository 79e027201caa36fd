"""Videos for tests, and a server that sends one by RTSP."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np

# A color a frame; frames 2 and 3 are the same.
COLORS = ((200, 30, 30), (30, 200, 30), (30, 30, 200), (30, 30, 200), (220, 220, 220))


def write_video(path: Path, colors: Sequence[tuple[int, int, int]] = COLORS, size=(64, 48)) -> Path:
    """One frame of each color, ten a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg" if path.suffix == ".avi" else "libx264", rate=10)
        stream.width, stream.height = size
        stream.pix_fmt = "yuvj420p" if path.suffix == ".avi" else "yuv420p"
        for color in colors:
            pixels = np.full((size[1], size[0], 3), color, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def video_frames(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@contextmanager
def rtsp_server(colors: Sequence[tuple[int, int, int]] = COLORS) -> Iterator[str]:
    """Sends one video to one client, JPEG frames in RTP over the client's TCP connection.

    RFC 2326 for what is said, section 10.12 for packets in between, RFC 2435 for JPEG (type 26).
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(20)
        thread = threading.Thread(target=_serve, args=(server, colors), daemon=True)
        thread.start()
        yield f"rtsp://user:secret@127.0.0.1:{server.getsockname()[1]}/camera"
        thread.join(20)


def _serve(server: socket.socket, colors: Sequence[tuple[int, int, int]]) -> None:
    sdp = "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nt=0 0\r\nm=video 0 RTP/AVP 26\r\n"
    headers = {
        "OPTIONS": "Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN\r\n",
        "DESCRIBE": f"Content-Type: application/sdp\r\nContent-Length: {len(sdp)}\r\n",
        "SETUP": "Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\nSession: 1\r\n",
        "PLAY": "Session: 1\r\n",
    }
    client, _ = server.accept()
    client.settimeout(20)
    with client, client.makefile("rb") as reader:
        while True:
            method = reader.readline().split(b" ")[0].decode()
            request = b"".join(iter(reader.readline, b"\r\n"))
            number = re.search(rb"CSeq: (\d+)", request)
            said = f"RTSP/1.0 200 OK\r\nCSeq: {int(number[1]) if number else 0}\r\n"
            body = sdp if method == "DESCRIBE" else ""
            client.sendall(f"{said}{headers.get(method, '')}\r\n{body}".encode())
            if method == "PLAY":
                break
        for packet in _rtp_packets(colors):
            client.sendall(b"$\x00" + len(packet).to_bytes(2, "big") + packet)


def _rtp_packets(colors: Sequence[tuple[int, int, int]]) -> Iterator[bytes]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        receiver.settimeout(0.5)
        place = f"rtp://127.0.0.1:{receiver.getsockname()[1]}"
        with av.open(place, "w", format="rtp") as container:
            # RFC 2435 knows the standard Huffman tables, and FFmpeg's sender no restart markers.
            stream = container.add_stream("mjpeg", rate=10, options={"huffman": "default"})
            stream.codec_context.thread_count = 1
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
            for color in colors:
                pixels = np.full((48, 64, 3), color, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode(None))
        while True:
            try:
                packet = receiver.recv(65536)
            except TimeoutError:
                return
            # 200 to 204 are reports of RTCP (RFC 3550).
            if not 200 <= packet[1] <= 204:
                yield packet
