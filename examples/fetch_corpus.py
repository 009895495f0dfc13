"""One corpus from the Hugging Face hub as JSON lines, streamed: the first so many billion tokens of it, gzipped.

    python examples/fetch_corpus.py --repository open-web-math/open-web-math --billions 27.5 --output raw/math.jsonl.gz

Called by prepare_data.sh. Needs `datasets`. The file appears under its name when it is complete. Tokens are estimated
at four bytes of text each; preprocess_data.py counts exactly. A corpus that is smaller ends where it ends, and the
blend of a recipe then repeats it.

Python-Edu publishes where each file lies instead of its text (blob_id, in Software Heritage's public bucket on S3);
`text_of` fetches these, which needs `boto3`.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prune.commands.running import run_command
from megatron_prune.config.options import option
from megatron_prune.errors import UserError

BYTES_PER_TOKEN = 4


def take(
    records: Iterable[Mapping[str, Any]], text_of: Callable[[Mapping[str, Any]], str], limit: int
) -> Iterator[str]:
    """Texts until `limit` bytes are reached; empty ones are left out."""
    total = 0
    for record in records:
        text = text_of(record)
        if not text:
            continue
        yield text
        total += len(text.encode())
        if total >= limit:
            return


def write(texts: Iterable[str], output: Path) -> int:
    """Write `{"text": ...}` lines, gzipped, under the file's name once complete; how many there are."""
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary, count = output.with_name(output.name + ".partial"), 0
    with gzip.open(temporary, "wt", encoding="utf-8", compresslevel=3) as file:
        for count, text in enumerate(texts, start=1):  # noqa: B007 - the last count is the result
            file.write(json.dumps({"text": text}) + "\n")
    temporary.replace(output)
    return count


def reader(key: str) -> Callable[[Mapping[str, Any]], str]:
    """How a record's text is found: under `key`, or at the place that its blob_id names."""
    blobs: list[Any] = []

    def text_of(record: Mapping[str, Any]) -> str:
        if record.get(key) is not None:
            return str(record[key])
        if "blob_id" not in record:
            raise KeyError(f"a record has neither {key} nor blob_id: {sorted(record)}")
        if not blobs:
            import boto3
            from botocore import UNSIGNED
            from botocore.config import Config

            blobs.append(boto3.client("s3", config=Config(signature_version=UNSIGNED)))
        found = blobs[0].get_object(Bucket="softwareheritage", Key=f"content/{record['blob_id']}")
        return gzip.decompress(found["Body"].read()).decode("utf-8", errors="ignore")

    return text_of


@dataclass(frozen=True)
class FetchOptions:
    """Its options."""

    repository: str = option(None, "on the hub", metavar="ID", required=True)
    configuration: str = option("-", "of the data set; - for none", metavar="NAME")
    key: str = option("text", "where a record holds its text")
    billions: float = option(None, "tokens that are wanted", required=True)
    share: float = option(1.0, "of them")
    output: str = option(None, "JSON lines, gzipped", metavar="FILE", required=True)


def fetch(arguments: FetchOptions) -> int:
    """Download and write; the exit status. Raises UserError."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError("fetch_corpus needs the package datasets; pip install datasets") from error
    configuration = None if arguments.configuration == "-" else arguments.configuration
    records = load_dataset(arguments.repository, configuration, split="train", streaming=True)
    limit = int(arguments.billions * arguments.share * 1e9 * BYTES_PER_TOKEN)
    count = write(take(records, reader(arguments.key), limit), Path(arguments.output))
    print(f"{arguments.output}: {count:,} documents")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    return run_command("fetch_corpus.py", FetchOptions, fetch, argv, about="One corpus from the hub as JSON lines.")


if __name__ == "__main__":
    sys.exit(main())
