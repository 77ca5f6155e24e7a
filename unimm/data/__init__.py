"""Data: raw shards -> documents -> token shards -> packed rows -> batches.

sources     where raw shards come from: files, https, s3, gs, hf, commands when allowed
media, sounds, films   bytes of one file -> str, picture, sound, film; refuses what is damaged
shards      tar files by offset: which shards, which samples, whole or named as damaged
manifest    what a shard holds and what it was made from; written last, it is the commit
templates   how a raw sample becomes documents
preparing, prefetch   raw samples -> signals, ahead of the codecs
coding, streams       signals -> codes, in batches; long ones in blocks
tokenize    one raw shard -> one token shard, whole or absent
tokenize_many, engines, ray_engine, progress   many shards, once each, however often a run is killed
packing     documents -> rows of one length
batch       ids -> positions, segments, loss weights, modalities
loader      the order of rows and samples, as a function of one integer
signals_data, module   batches for codecs and for language models, as Lightning data modules
folders, tables   pictures, sounds, films and captions -> raw shards
dialpad, digits, worlds   two worlds to learn from, and the steps around their shards
"""
