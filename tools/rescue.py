#!/usr/bin/env python3
"""Reads a Stillpoint repository in a local folder without any of Stillpoint's code.

Written from docs/format/repository.md alone, as proof that the document is enough, and for the day on which nothing
else is left. Needs Python 3.9 or later and three packages from PyPI: cryptography, zstandard, blake3.

  rescue.py FOLDER (--key-file FILE | --passphrase-file FILE) list
  rescue.py FOLDER (…) show SNAPSHOT
  rescue.py FOLDER (…) restore SNAPSHOT PART OUTPUT

`restore` writes a sparse raw image. Every byte is verified before it is written; whatever is damaged ends the program.
"""

import argparse
import base64
import hashlib
import hmac
import json
import os
import pathlib
import struct
import sys

import zstandard
from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

FORMAT = 1
BLOCK = 4096
FANOUT = 64
LEVEL_MAX = 6
HOLE = 0xFFFF


class Damaged(Exception):
    """What was read is not what was written."""


def must(condition, what):
    if not condition:
        raise Damaged(what)


# --- age (https://age-encryption.org/v1): only what key slots use ---


def unpadded(text):
    must("=" not in text, "padded base64 in a key slot")
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)


def hkdf(key, salt, info):
    return HKDF(algorithm=SHA256(), length=32, salt=salt, info=info).derive(key)


def bech32_key(text):
    """The 32 bytes behind AGE-SECRET-KEY-1…"""
    human, _, data = text.lower().rpartition("1")
    must(human == "age-secret-key-", "the key file holds no age secret key")
    values = ["qpzry9x8gf2tvdw0s3jn54khce6mua7l".index(c) for c in data]
    check = 1
    expanded = [ord(c) >> 5 for c in human] + [0] + [ord(c) & 31 for c in human]
    for value in expanded + values:
        top = check >> 25
        check = (check & 0x1FFFFFF) << 5 ^ value
        for bit, generator in enumerate((0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3)):
            check ^= generator if top >> bit & 1 else 0
    must(check == 1, "the key file's checksum does not fit")
    bits = 0
    for value in values[:-6]:
        bits = bits << 5 | value
    return (bits >> (5 * len(values[:-6]) - 256)).to_bytes(32, "big")


def age_decrypt(file, secret):
    """The plaintext of an age file, or None if the secret is for another."""
    head_end = file.index(b"\n--- ") + 5
    line_end = file.index(b"\n", head_end)
    lines = file[:head_end].decode("ascii").split("\n")
    must(lines[0] == "age-encryption.org/v1", "a key slot is no age file")
    file_key = None
    at = 1
    while lines[at].startswith("-> "):
        words = lines[at][3:].split(" ")
        body = ""
        at += 1
        while True:
            body += lines[at]
            at += 1
            if len(lines[at - 1]) < 64:
                break
        file_key = file_key or unwrap(words, unpadded(body), secret)
    if file_key is None:
        return None
    mac = hmac.new(hkdf(file_key, b"", b"header"), file[: head_end - 1], hashlib.sha256).digest()
    must(hmac.compare_digest(mac, unpadded(file[head_end:line_end].decode("ascii"))), "a key slot's header is damaged")
    nonce, payload = file[line_end + 1 : line_end + 17], file[line_end + 17 :]
    key = ChaCha20Poly1305(hkdf(file_key, nonce, b"payload"))
    must(len(payload) <= 65536 + 16, "a key slot is too long")
    # One chunk, the last: number 0, flag 1.
    return key.decrypt(bytes(11) + b"\1", payload, None)


def unwrap(words, body, secret):
    kind, value = secret
    try:
        if kind == "passphrase" and words[0] == "scrypt":
            must(int(words[2]) <= 20, "a key slot asks for too much memory")
            salt = b"age-encryption.org/v1/scrypt" + unpadded(words[1])
            wrap = Scrypt(salt=salt, length=32, n=1 << int(words[2]), r=8, p=1).derive(value)
        elif kind == "key" and words[0] == "X25519":
            share = unpadded(words[1])
            own = X25519PrivateKey.from_private_bytes(value)
            public = own.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
            shared = own.exchange(X25519PublicKey.from_public_bytes(share))
            wrap = hkdf(shared, share + public, b"age-encryption.org/v1/X25519")
        else:
            return None
        return ChaCha20Poly1305(wrap).decrypt(bytes(12), body, None)
    except InvalidTag:
        return None


# --- identifiers, payloads, sealed objects ---

ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"


def id_bytes(text):
    must(len(text) == 26 and text[0] <= "7" and all(c in ALPHABET for c in text), f"{text} is no identifier")
    bits = 0
    for character in text:
        bits = bits << 5 | ALPHABET.index(character)
    return bits.to_bytes(16, "big")


def id_text(data):
    bits = int.from_bytes(data, "big")
    return "".join(ALPHABET[bits >> 5 * place & 31] for place in reversed(range(26)))


def payload_plaintext(payload, limit):
    must(payload and payload[0] in (0, 1), "an unknown payload")
    if payload[0] == 0:
        plaintext = payload[1:]
    else:
        size = zstandard.frame_content_size(payload[1:])
        must(0 <= size <= limit, "a payload that is too large")
        plaintext = zstandard.ZstdDecompressor().decompress(payload[1:], max_output_size=limit)
    must(len(plaintext) <= limit, "a payload that is too large")
    return plaintext


class Repository:
    def __init__(self, folder, secret):
        self.folder = pathlib.Path(folder)
        config = json.loads((self.folder / "config").read_bytes())
        if config["format"] != FORMAT:
            sys.exit(f"the repository has format {config['format']}; this program knows format {FORMAT}")
        self.id = bytes.fromhex(config["repository"])
        self.master = self.unlock(secret)
        self.checksum_key = self.derive("stillpoint repository v1 block checksum", b"")
        self.node_frames = {}
        self.data_frames = {}

    def unlock(self, secret):
        for slot in sorted((self.folder / "keys").iterdir()):
            plaintext = age_decrypt(slot.read_bytes(), secret)
            if plaintext is not None:
                expected = b"stillpt\0" + struct.pack("<II", FORMAT, 0) + self.id
                must(len(plaintext) == 64 and plaintext[:32] == expected, "a key slot of another repository")
                return plaintext[32:]
        sys.exit("no key of this repository opens with this secret")

    def derive(self, context, material):
        return blake3(self.master + material, derive_key_context=context).digest()

    def sealed(self, name):
        data = (self.folder / name).read_bytes()
        key = self.derive("stillpoint repository v1 object", name.encode())
        return payload_plaintext(AESGCM(key).decrypt(data[:12], data[12:], None), 64 << 20)

    def snapshots(self):
        for path in sorted((self.folder / "manifests").iterdir()):
            try:
                id_bytes(path.name)
            except Damaged:
                continue  # NAME#NUMBER, or nothing of ours
            manifest = self.sealed(f"manifests/{path.name}")
            manifest = json.loads(manifest)
            must(manifest["format"] == FORMAT and manifest["snapshot"] == path.name, f"{path.name} is not itself")
            if not (self.folder / "revoked" / manifest["lease"]).exists():
                yield path.name, manifest

    def snapshot(self, prefix):
        found = [(name, manifest) for name, manifest in self.snapshots() if name.startswith(prefix)]
        if len(found) != 1:
            sys.exit(f"{len(found)} snapshots have an id that begins with {prefix}")
        return found[0][1]["manifest"]

    def frame(self, pack, offset, length, kind, limit):
        lease, sequence = pack
        with open(self.folder / "packs" / id_text(lease) / f"{sequence:08x}", "rb") as file:
            file.seek(offset)
            data = file.read(length)
        key = self.derive("stillpoint repository v1 pack", lease + struct.pack("<I", sequence))
        nonce = bytes(4) + struct.pack("<Q", offset)
        return payload_plaintext(AESGCM(key).decrypt(nonce, data, bytes([kind])), limit)

    def node_frame(self, pack, offset, length):
        address = (pack, offset, length)
        if address not in self.node_frames:
            plaintext = self.frame(pack, offset, length, 1, 256 << 10)
            packs, nodes = struct.unpack_from("<HH", plaintext)
            must(1 <= nodes <= 255, "a node frame without nodes")
            names = [struct.unpack_from("<16sI", plaintext, 4 + 20 * number) for number in range(packs)]
            at = 4 + 20 * packs
            ends = struct.unpack_from(f"<{nodes}I", plaintext, at)
            at += 4 * nodes
            must(at + ends[-1] == len(plaintext), "a node frame of another length")
            starts = (0,) + ends[:-1]
            must(all(start < end for start, end in zip(starts, ends)), "node ends that do not rise")
            if len(self.node_frames) > 256:
                self.node_frames.clear()
            self.node_frames[address] = names, [plaintext[at + s : at + e] for s, e in zip(starts, ends)]
        return self.node_frames[address]

    def data_frame(self, pack, offset, length):
        address = (pack, offset, length)
        if address not in self.data_frames:
            plaintext = self.frame(pack, offset, length, 0, 32 * BLOCK)
            must(plaintext and len(plaintext) % BLOCK == 0, "a data frame that is no whole blocks")
            if len(self.data_frames) > 512:
                self.data_frames.clear()
            self.data_frames[address] = plaintext
        return self.data_frames[address]

    def blocks(self, root):
        """Number and content of every block that is no hole, in order."""
        if "node" not in root:
            return
        count = -(-root["size_bytes"] // BLOCK)
        level = next(level for level in range(LEVEL_MAX + 1) if FANOUT ** (level + 1) >= count)
        node = root["node"]
        lease, sequence = node["pack"].split("/")
        pack = (id_bytes(lease), int(sequence, 16))
        yield from self.below(pack, node["offset"], node["length"], node["index"], level, 0)

    def below(self, pack, offset, length, index, level, first_block):
        names, nodes = self.node_frame(pack, offset, length)
        must(index < len(nodes), "a node that is not in its frame")
        node = nodes[index]
        found_level, entries, zero, found_first = struct.unpack_from("<BB6sQ", node)
        must((found_level, found_first) == (level, first_block), "a node that is not its parent's child")
        must(zero == bytes(6) and 1 <= entries <= FANOUT, "a node out of bounds")
        table = [struct.unpack_from("<BBHII", node, 16 + 12 * number) for number in range(entries)]
        at = 16 + 12 * entries
        if level > 0:
            must(at == len(node), "a node of another length")
            slots = [entry[0] for entry in table]
            must(slots == sorted(set(slots)) and slots[-1] < FANOUT, "children out of order")
            for slot, child, place, child_offset, child_length in table:
                child_first = first_block + slot * FANOUT**level
                yield from self.below(names[place], child_offset, child_length, child, level - 1, child_first)
            return
        must(sum(run[0] for run in table) == FANOUT, "runs that do not add up")
        block = first_block
        for blocks, first, place, frame_offset, frame_length in table:
            for number in range(blocks if place != HOLE else 0):
                frame = self.data_frame(names[place], frame_offset, frame_length)
                content = frame[(first + number) * BLOCK : (first + number + 1) * BLOCK]
                checksum = blake3(content, key=self.checksum_key).digest()[:16]
                must(len(content) == BLOCK and checksum == node[at : at + 16], f"block {block + number} is not what it was")
                at += 16
                yield block + number, content
            block += blocks
        must(at == len(node), "a leaf of another length")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    secret = parser.add_mutually_exclusive_group(required=True)
    secret.add_argument("--key-file")
    secret.add_argument("--passphrase-file")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list")
    commands.add_parser("show").add_argument("snapshot")
    restore = commands.add_parser("restore")
    for name in ("snapshot", "part", "output"):
        restore.add_argument(name)
    wanted = parser.parse_args()

    if wanted.key_file:
        lines = pathlib.Path(wanted.key_file).read_text().split()
        secret = ("key", bech32_key(next(line for line in lines if line.startswith("AGE-SECRET-KEY-1"))))
    else:
        secret = ("passphrase", pathlib.Path(wanted.passphrase_file).read_bytes().rstrip(b"\r\n"))
    try:
        repository = Repository(wanted.folder, secret)
        if wanted.command == "list":
            for name, manifest in repository.snapshots():
                manifest = manifest["manifest"]
                print(name, manifest["vm"], manifest["level"], *(part["name"] for part in manifest["parts"]))
        elif wanted.command == "show":
            json.dump(repository.snapshot(wanted.snapshot), sys.stdout, indent=1)
            print()
        else:
            parts = repository.snapshot(wanted.snapshot)["parts"]
            root = next(part["root"] for part in parts if part["name"] == wanted.part)
            with open(wanted.output, "xb") as output:
                output.truncate(root["size_bytes"])
                for number, content in repository.blocks(root):
                    rest = root["size_bytes"] - number * BLOCK
                    must(rest > 0 and not any(content[rest:]), "data behind the end of the disk")
                    os.pwrite(output.fileno(), content[:rest], number * BLOCK)
                os.fsync(output.fileno())
    except (Damaged, InvalidTag, zstandard.ZstdError, struct.error, ValueError) as error:
        sys.exit(f"damaged: {error or type(error).__name__}")


if __name__ == "__main__":
    main()
