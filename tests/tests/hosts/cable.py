"""One end of a detour between two hosts: packets of the interface slow0 go to the other end, each so many seconds late.

Runs in the network of its host. The two ends know each other by sockets in files: cable.py OWN OTHER SECONDS
"""

import collections
import fcntl
import os
import select
import socket
import struct
import sys
import time

TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000

own, other, delay = sys.argv[1], sys.argv[2], float(sys.argv[3])
interface = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
fcntl.ioctl(interface, TUNSETIFF, struct.pack("16sH22x", b"slow0", IFF_TUN | IFF_NO_PI))
link = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
link.bind(own)
# In the order in which they are due.
waiting = collections.deque()
while True:
    patience = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
    for ready in select.select([interface, link], [], [], patience)[0]:
        if ready is link:
            packet = link.recv(65536)
            try:
                os.write(interface, packet)
            except OSError:
                pass  # An interface that is not up yet, or not any more, loses what comes.
        else:
            try:
                waiting.append((time.monotonic() + delay, os.read(interface, 65536)))
            except OSError:
                sys.exit(0)  # The interface was deleted.
    while waiting and waiting[0][0] <= time.monotonic():
        try:
            link.sendto(waiting.popleft()[1], other)
        except OSError:
            pass  # The other end is not there yet, or not any more.
