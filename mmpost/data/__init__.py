"""Rows of any supported format as samples: read, check, split, draw. Readers are found by name."""

# Row formats; each object is a Reader (mmpost.data.readers.row). The order is the order of recognition.
READERS = {
    "messages": "mmpost.data.readers.messages:READER",
    "sharegpt": "mmpost.data.readers.sharegpt:READER",
    "preference": "mmpost.data.readers.preference:READER",
    "prompts": "mmpost.data.readers.prompts:READER",
}

# Where rows are stored; each object yields RawRow (mmpost.data.readers.row).
CONTAINERS = {
    ".jsonl": "mmpost.data.readers.json_file:read_jsonl",
    ".json": "mmpost.data.readers.json_file:read_json",
    ".parquet": "mmpost.data.readers.parquet:read_parquet",
    "data set on disk": "mmpost.data.readers.hub:read_saved",
    "hub data set": "mmpost.data.readers.hub:read_hub",
}
