"""Saves rows one after the other with asyncpg, from a pool, until its standard input ends.

What it sees is one line each: `saved PORT ID`, `refused` (25006: this node is down now), `unreachable` (no node would do, or
the connection went). A row that was not acknowledged is sent again under the same key, so it cannot be there twice.
"""

import asyncio
import sys
import time
import uuid

import asyncpg

PATIENCE = 30
UNREACHABLE = (OSError, asyncio.TimeoutError, asyncpg.PostgresConnectionError, asyncpg.InterfaceError,
               asyncpg.TargetServerAttributeNotMatched, asyncpg.CannotConnectNowError, asyncpg.AdminShutdownError)


async def save(pool, cookie):
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            async with pool.acquire(timeout=5) as connection:
                port = await connection.fetchval("select inet_server_port()")
                await connection.execute(
                    "insert into stillebot.http_sessions (cookie) values ($1) on conflict do nothing", cookie
                )
            print("saved", port, cookie, flush=True)
            return
        except asyncpg.ReadOnlySQLTransactionError:
            print("refused", flush=True)
        except UNREACHABLE:
            print("unreachable", flush=True)
        if time.monotonic() > deadline:
            raise TimeoutError(f"{cookie} could not be saved in {PATIENCE} s")
        # Those in the pool stay where they are: only a new connection looks for the live node.
        await pool.expire_connections()
        await asyncio.sleep(0.05)


async def main(url):
    ended = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    pool = await asyncpg.create_pool(url, min_size=2, max_size=2, timeout=2)
    while not ended.done():
        await save(pool, str(uuid.uuid4()))
        await asyncio.sleep(0.01)
    await pool.close()


asyncio.run(main(sys.argv[1]))
