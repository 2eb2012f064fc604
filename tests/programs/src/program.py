import asyncio, http.server, threading, urllib.request, subprocess, sys, os, venv, tempfile, signal, socket, time
async def main():
    p = await asyncio.create_subprocess_exec('sh','-c','read a; echo got $a; exit 5', stdin=-1, stdout=-1)
    print('subprocess', await p.communicate(b'word\n'), p.returncode)
    async def h(r, w):
        w.write(await r.readline()); await w.drain(); w.close()
    s = await asyncio.start_server(h, '127.0.0.1', 0)
    port = s.sockets[0].getsockname()[1]
    async def c(i):
        r, w = await asyncio.open_connection('127.0.0.1', port)
        w.write(b'%d\n' % i); x = await r.read(); w.close(); return int(x)
    print('streams', sum(await asyncio.gather(*[c(i) for i in range(50)])))
    loop = asyncio.get_running_loop(); f = loop.create_future()
    loop.add_signal_handler(signal.SIGUSR1, f.set_result, 'signal'); os.kill(os.getpid(), signal.SIGUSR1); print(await f)
    try: await asyncio.wait_for(asyncio.sleep(10), 0.05)
    except asyncio.TimeoutError: print('timeout')
    print(await asyncio.to_thread(lambda: 'thread'))
    print(await loop.getaddrinfo('localhost', 80, family=socket.AF_INET, type=socket.SOCK_STREAM))
asyncio.run(main())
os.chdir(tempfile.mkdtemp()); open('f.txt','w').write('x'*300000)
class H(http.server.SimpleHTTPRequestHandler):
    def log_message(*a): pass
s = http.server.ThreadingHTTPServer(('127.0.0.1', 0), H)
threading.Thread(target=s.serve_forever, daemon=True).start()
print('http', len(urllib.request.urlopen('http://127.0.0.1:%d/f.txt' % s.server_port).read())); s.shutdown()
venv.create('v', with_pip=len(sys.argv) > 1)
print('venv', subprocess.run(['v/bin/python','-c','import sys; print(sys.prefix != sys.base_prefix)'], capture_output=True, text=True).stdout)
print('py ok')
