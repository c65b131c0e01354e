"""Ray and the machine: sessions, actor pools, streams, progress, tracking."""
