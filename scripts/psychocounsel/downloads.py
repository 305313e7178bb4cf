"""Downloads that go on where they broke off, in this run or a later one, and never join the halves of two different files.

What has arrived lies in a partial file; beside it stands which version of the file it is the beginning of (the server's ETag or
Last-Modified). A later try asks for the rest of that version alone (If-Range): where the file has changed, the server sends it whole.
Files of the Hugging Face Hub come from HF_ENDPOINT, where the environment names a mirror, and with HF_TOKEN, where it holds one.
"""

import fcntl
import json
import os
import time
from pathlib import Path

from psychocounsel.errors import UserError
from psychocounsel.pins import HUB
from psychocounsel.records import file_sha256
from psychocounsel.stage import log

CODE_VERSION = 1  # a file's bytes are checked against its sha256, however they came

BODY_ATTEMPTS = 5  # tries in a row; each has its own retries for connecting
TIMEOUT = (10, 60)  # seconds to connect, and between two pieces of the body
PIECE = 1 << 16  # bytes; what is lost of a body that breaks off is less than one piece


def hub_token(address: str) -> str | None:
    """Return the environment's token for the Hub, where an address is one of the Hub."""
    return os.environ.get("HF_TOKEN") if address.startswith(f"{HUB}/") else None


def download(address: str, partial: Path, sha256: str | None, remedy: str) -> None:
    """Download a file whole to `partial`, or leave there what has come of it for a later call and raise UserError with the remedy."""
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.util import Retry

    session = requests.Session()
    retry = Retry(total=3, backoff_factor=0.5, status_forcelist=[429, 500, 502, 503, 504], respect_retry_after_header=True)
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry))
    broken = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError, requests.exceptions.RetryError)

    partial.parent.mkdir(parents=True, exist_ok=True)
    with open(partial, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{address}: another process is downloading it to {partial}; wait for it to end") from None
        for attempt in range(1, BODY_ATTEMPTS + 1):
            had = file.seek(0, os.SEEK_END)
            try:
                fetch_rest(session, address, file, partial, sha256)
            except requests.HTTPError as error:
                code, reason = error.response.status_code, error.response.reason
                login = " It wants an account that was granted access: set HF_TOKEN, or take it by hand." if code in (401, 403) else ""
                raise UserError(f"{address}: the server answers {code} {reason}.{login}{kept(partial)} {remedy}") from None
            except broken as error:
                log.warning("%s: attempt %d of %d broke off: %s", address, attempt, BODY_ATTEMPTS, type(error).__name__)
                if attempt == BODY_ATTEMPTS:
                    raise UserError(f"{address}: no download ({error}).{kept(partial)} Is this machine offline? {remedy}") from None
                time.sleep(2 ** (attempt - 1))
            else:
                if had and sha256 and file_sha256(partial) != sha256:
                    log.warning("%s: what was continued is not the file; taking it from its beginning", address)
                    file.truncate(0)
                    continue
                note_file(partial).unlink(missing_ok=True)
                return
        raise UserError(f"{address}: each try ended in another file than the one expected. {remedy}")


def kept(partial: Path) -> str:
    """Say what of a file is kept for the next try; remove an empty one."""
    if size := partial.stat().st_size:
        return f" {size} bytes are kept for the next try."
    partial.unlink()
    return ""


def fetch_rest(session, address: str, file, partial: Path, sha256: str | None) -> None:
    """Append to a partial file what is missing of the same version, or write it anew where there is no telling or another version."""
    import requests

    noted, have = note_of(partial), file.seek(0, os.SEEK_END)
    version = noted.get("version")
    if noted.get("address") != address or not (version or sha256):  # nothing would tell whether the rest belongs to what is here
        have = 0
    headers = {"Accept-Encoding": "identity"}
    headers |= {"Range": f"bytes={have}-"} if have else {}
    headers |= {"If-Range": version} if have and version else {}
    if token := hub_token(address):
        headers["Authorization"] = f"Bearer {token}"  # requests drops it where the Hub sends us on to another host
    with session.get(at_mirror(address), headers=headers, stream=True, timeout=TIMEOUT) as response:
        came = response.headers.get("Content-Range", "")
        if have and response.status_code == 416 and came == f"bytes */{have}":  # it broke off at its very end
            return
        if response.status_code != 416:
            response.raise_for_status()
        continues = have and response.status_code == 206 and came.startswith(f"bytes {have}-") and version_of(response) == version
        if not continues:
            file.truncate(0)  # before the note, so that a kill between the two leaves nothing that the note does not fit
            if response.status_code in (206, 416):
                raise requests.ConnectionError("the server sends another part than the one that is missing")
            note_file(partial).write_text(json.dumps({"address": address, "version": version_of(response)}))
        for piece in response.iter_content(PIECE):
            file.write(piece)
        file.flush()


def at_mirror(address: str) -> str:
    """Return where a file of the Hub is taken from: the mirror that HF_ENDPOINT names, or the Hub."""
    mirror = os.environ.get("HF_ENDPOINT")
    return mirror.rstrip("/") + address.removeprefix(HUB) if mirror and address.startswith(f"{HUB}/") else address


def version_of(response) -> str | None:
    """Return what names the version of a file that a server sends: its strong ETag, else its date; None where it names none."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified")


def note_file(partial: Path) -> Path:
    """Return where it is noted of which version a partial file is the beginning."""
    return partial.with_name(partial.name + ".version")


def note_of(partial: Path) -> dict:
    """Return the address and version of a partial file; nothing where they are not known."""
    try:
        return json.loads(note_file(partial).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
