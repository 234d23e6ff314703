"""Documents and conversations from files: tokenised once, packed into rows, mixed by weights.

config.py says what there is to say in YAML. files.py finds files, readers.py reads them; texts.py and
chats.py make tokens of what they hold (document.py says what a document is, encoders.py chooses). cache.py
says where tokens are kept, shards.py how, and preparing.py puts them there. packing.py lays documents into
rows, layout.py keeps these, mixing.py says which data set a row is from, source.py makes batches of them.
"""
