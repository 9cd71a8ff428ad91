"""Large files over HTTP that may break off, resumed where they stopped and never taken for whole before they are."""

import http.client
import os
import ssl
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from data.tokens import DataError, read_header

# Not every OSError: a full disk is no reason to try again.
NETWORK_ERRORS = (urllib.error.URLError, ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException)
TRIES, WAIT = 5, 2.0  # attempts in a row that bring nothing; seconds after the first, doubled after each


def download(url, path, check=None, quiet=False):
    """
    Downloads url to path by way of path.part, which a later call goes on with. check(part) may raise DataError for
    content that is whole but wrong; the part is removed then, as it is when its length is not the announced one.
    Raises DataError, and leaves path as it was.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    tries = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            total = fetch(url, part, quiet)
            break
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 429):
                raise DataError(f"{url}: HTTP {error.code} {error.reason}; check --base_url, or run the same command "
                                "later") from None
            reason = f"HTTP {error.code} {error.reason}"
        except NETWORK_ERRORS as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        except DataError:
            raise
        except ValueError as error:  # not a URL
            raise DataError(f"{url}: {error}; check --base_url") from None
        now = part.stat().st_size if part.exists() else 0
        tries = 1 if now > before else tries + 1
        if tries == TRIES:
            raise DataError(f"{url}: broke off at {now} bytes ({reason}); run the same command again to go on")
        if not quiet:
            print(f"{path.name}: {reason} at {now} bytes, trying again", file=sys.stderr)
        time.sleep(WAIT * 2 ** (tries - 1))
    try:
        if part.stat().st_size != total:
            raise DataError(f"{url}: {part.stat().st_size} bytes came and {total} were announced; removed, run the "
                            "same command again")
        if check:
            check(part)
    except DataError:
        part.unlink()
        validator_file(part).unlink(missing_ok=True)
        raise
    os.replace(part, path)
    validator_file(part).unlink(missing_ok=True)


def is_finished(path):
    """Whether a whole .bin file is at this path already."""
    try:
        return read_header(path) > 0
    except (DataError, FileNotFoundError):
        return False


def validator_file(part):
    """Where the ETag of the half-loaded file is kept: *.etag.part"""
    return part.with_name(part.name[:-len(".part")] + ".etag.part")


def fetch(url, part, quiet):
    """
    One attempt: goes on with the part if it is of the file the server has now, else starts it again. Returns the size
    announced for the whole file; raises ConnectionError if the transfer ends before that.
    """
    saved = validator_file(part)
    have = part.stat().st_size if part.exists() and saved.exists() else 0
    headers = {"Range": f"bytes={have}-", "If-Range": saved.read_text()} if have else {}
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the part is as long as the file or longer
            part.unlink()
            raise ConnectionError("the server has nothing after the part, starting again") from None
        raise
    with response:
        etag = response.headers.get("ETag", "")
        if response.status == 206:
            # Some servers skip If-Range, and then a file that changed would be spliced from two.
            span, _, total = response.headers["Content-Range"].partition("/")
            if etag != saved.read_text() or not span.startswith(f"bytes {have}-"):
                part.unlink()
                raise ConnectionError("the file changed on the server, starting again")
        else:
            have, total = 0, response.headers.get("Content-Length")
            saved.unlink(missing_ok=True)
        if not (total or "").isdigit():
            raise DataError(f"{url}: the server announces no length; use another --base_url")
        with open(part, "ab" if have else "wb") as out, \
                tqdm(desc=part.name[:-len(".part")], initial=have, total=int(total), unit="B", unit_scale=True,
                     disable=True if quiet else None) as bar:
            if etag and not etag.startswith("W/"):  # a weak one does not promise the same bytes
                saved.write_text(etag)
            while block := response.read(2 ** 20):
                out.write(block)
                bar.update(len(block))
            out.flush()
            os.fsync(out.fileno())
            if out.tell() < int(total):
                raise ConnectionError("connection closed")
    return int(total)
