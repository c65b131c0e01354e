"""The index: an immutable directory of tiles' numbers that a search opens by itself.

    CURRENT                   name of the published version; the only file that ever changes
    versions/v000001/         manifest.json, rejected.jsonl
    shards/<sha>/             u.npy, tiles.arrow, shard.json (`shard`)
    codes/<sha>.faiss         FAISS codes of one shard, array lists; ids are its rows (`ann`)
    coarse/<sha>/             shortlist head and trained, empty FAISS index (`coarse`)
    ann/<sha>.faiss           codes of some shards, merged in their order, packed for fast scans
    heads/<fingerprint>/      copy of the matcher's directory
    probes/<sha>.parquet      some tiles' pictures and what the matcher made of them (`verify`)
    deleted/<sha>.npy         rows that no search gives

`versions` keeps the promise: a reader never sees half an index, and keeps the version it opened.
"""
