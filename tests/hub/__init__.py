"""A Hub of our own on the loopback, which the real huggingface_hub client drives over real sockets.

wire            requests, answers, refusals, routes, ranges
connection      HTTP/1.1 over asyncio: reads a request, lets the fault plan act, sends the answer
faults, calls   what is to go wrong; what was asked
objects         contents by sha256, in memory or on disk
git             object ids as git computes them
repositories    commits, trees, branches, tags, pull requests
accounts        users, organisations, tokens, and what each may do
state           all of it, and the rights of a request
api_*           the Hub origin, a file for each part of its interface
cdn, xet, lz4   the origin of large files: LFS objects, and Xet's content-addressed store
origins         two ports and the thread that serves them
server          LocalHub: all of it, and a Python side door to seed, read and break it
client          a long-lived interpreter with huggingface_hub imported, for tests of the Hub itself
fixture         the pytest fixtures; a test module imports what it needs from there
"""
