const http=require('http'),fs=require('fs'),cp=require('child_process'),os=require('os'),path=require('path'),net=require('net'),crypto=require('crypto'),zlib=require('zlib');
const {Worker,isMainThread,parentPort,workerData}=require('worker_threads');
if(!isMainThread){let s=0;for(let i=0;i<workerData;i++)s+=i;parentPort.postMessage(s);}
else (async()=>{
 const server=http.createServer((q,r)=>{let n=0;q.on('data',d=>n+=d.length);q.on('end',()=>r.end(`${q.method} ${n}`));});
 await new Promise(r=>server.listen(0,'127.0.0.1',r));const port=server.address().port;
 const post=i=>new Promise((ok,no)=>{const q=http.request({port,host:'127.0.0.1',method:'POST',agent:false},r=>{let b='';r.on('data',d=>b+=d);r.on('end',()=>ok(b));});q.on('error',no);q.end(Buffer.alloc(20000+i));});
 console.log('http',(await Promise.all([...Array(10).keys()].map(post))).join(','));server.close();
 console.log('worker',await new Promise((ok,no)=>{const w=new Worker(__filename,{workerData:1000});w.on('message',ok);w.on('error',no);}));
 console.log('exec',cp.execSync('echo from the shell; exit 0').toString().trim(),cp.spawnSync('sh',['-c','cat; exit 4'],{input:'in'}).status);
 const c=cp.spawn('cat');c.stdin.write('piped');c.stdin.end();let o='';for await(const d of c.stdout)o+=d;console.log('spawn',o);
 const f=cp.fork(require('path').join(__dirname,'child.js'));console.log('fork',await new Promise(r=>{f.on('message',r);f.send('ping');}));
 const d=fs.mkdtempSync(path.join(os.tmpdir(),'n'));
 await Promise.all([...Array(50).keys()].map(i=>fs.promises.writeFile(path.join(d,''+i),'x'.repeat(i))));
 const w=new Promise(r=>{const x=fs.watch(d,(e,n)=>{x.close();r(n);});});fs.writeFileSync(path.join(d,'new'),'');console.log('watch',await w);
 console.log('files',(await fs.promises.readdir(d)).length);fs.rmSync(d,{recursive:true});
 console.log('crypto',crypto.createHash('sha256').update('x').digest('hex').slice(0,8),await new Promise(r=>zlib.gzip('x'.repeat(1e5),(e,b)=>r(zlib.gunzipSync(b).length))));
 const u=net.createServer(s=>s.pipe(s)).listen('/tmp/n.sock');await new Promise(r=>u.on('listening',r));
 console.log('unix',await new Promise(r=>{const s=net.connect('/tmp/n.sock',()=>s.write('hi'));s.on('data',d=>{s.end();r(d.toString());});}));u.close();
 process.on('SIGUSR2',()=>{console.log('signal');process.exitCode=0;clearInterval(t);});const t=setInterval(()=>{},1000);process.kill(process.pid,'SIGUSR2');
 console.log('os',os.cpus().length>0,os.totalmem()>0,os.networkInterfaces().lo[0].address,require('dns').getServers().length>=0);
 await new Promise(r=>require('dns').lookup('localhost',(e,a)=>{console.log('dns',e,!!a);r();}));
 process.on('exit',()=>console.log('node ok'));
})();
