"""The index: an immutable directory of tiles' vectors that a search opens by itself.

    CURRENT                   name of the published version; the only file that ever changes
    versions/v000001/         manifest.json, rejected.jsonl
    shards/<sha>/             vectors.npy, tiles.arrow, shard.json (`shard`)
    codes/<sha>.faiss         FAISS codes of one shard, array lists; ids are its rows
    shortlist/<sha>/          trained, empty FAISS index (`shortlist`)
    ann/<sha>.faiss           codes of some shards, merged in their order, packed for fast scans
    matcher/<fingerprint>/    copy of the matcher's directory
    check_samples/<sha>.parquet  some tiles' pictures, to embed again (`verify`)
    deleted/<sha>.npy         rows that no search returns
    LOCK, .staging-*/, building/  of publications and builds that run, or were killed

A reader never sees half an index, and keeps the version that it opened (`versions`).
"""
