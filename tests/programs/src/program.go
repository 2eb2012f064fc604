// Go runtime on the kernel: goroutines, timers, net/http to itself, os/exec, signals, files.
package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

func must(err error) {
	if err != nil {
		fmt.Println("FAILED:", err)
		os.Exit(1)
	}
}

func main() {
	if len(os.Args) > 1 && os.Args[1] == "child" {
		data, err := io.ReadAll(os.Stdin)
		must(err)
		fmt.Printf("child got %d bytes, %s", len(data), os.Getenv("WORD"))
		os.Exit(3)
	}
	// Goroutines, channels, locks, garbage.
	var sum atomic.Int64
	var group sync.WaitGroup
	channel := make(chan int)
	for i := 0; i < 200; i++ {
		group.Add(1)
		go func() {
			defer group.Done()
			for n := range channel {
				garbage := make([]byte, 10000+n)
				sum.Add(int64(len(garbage)))
			}
		}()
	}
	for i := 0; i < 5000; i++ {
		channel <- i
	}
	close(channel)
	group.Wait()
	runtime.GC()
	fmt.Println("goroutines:", sum.Load())

	// A thread that computes is pre-empted by a signal.
	var stop atomic.Bool
	done := make(chan bool)
	go func() {
		for !stop.Load() {
		}
		done <- true
	}()
	time.Sleep(30 * time.Millisecond)
	stop.Store(true)
	<-done
	fmt.Println("preempted")

	// HTTP to itself.
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must(err)
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%s %s %d", r.Method, r.URL.Path, len(body))
	})}
	go server.Serve(listener)
	address := "http://" + listener.Addr().String()
	errors := make(chan error, 20)
	for i := 0; i < 20; i++ {
		go func(i int) {
			answer, err := http.Post(fmt.Sprintf("%s/%d", address, i), "text/plain", io.LimitReader(zeros{}, 50000))
			if err == nil {
				var body []byte
				body, err = io.ReadAll(answer.Body)
				answer.Body.Close()
				if want := fmt.Sprintf("POST /%d 50000", i); err == nil && string(body) != want {
					err = fmt.Errorf("%q", body)
				}
			}
			errors <- err
		}(i)
	}
	for i := 0; i < 20; i++ {
		must(<-errors)
	}
	must(server.Shutdown(context.Background()))
	fmt.Println("http: 20 answers")

	// Processes.
	self, err := os.Executable()
	must(err)
	child := exec.Command(self, "child")
	child.Env = append(os.Environ(), "WORD=word")
	input, err := child.StdinPipe()
	must(err)
	go func() { io.CopyN(input, zeros{}, 100000); input.Close() }()
	output, err := child.Output()
	fmt.Printf("exec: %s; %v\n", output, err)
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	err = exec.CommandContext(ctx, "/bin/sleep", "100").Run()
	cancel()
	fmt.Println("sleep:", err)

	// Signals.
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGUSR1, syscall.SIGTERM)
	must(syscall.Kill(os.Getpid(), syscall.SIGUSR1))
	fmt.Println("signal:", <-signals)

	// Files.
	directory, err := os.MkdirTemp("", "go")
	must(err)
	for i := 0; i < 50; i++ {
		must(os.WriteFile(filepath.Join(directory, fmt.Sprint(i)), []byte("text"), 0o600))
	}
	count := 0
	must(filepath.WalkDir(directory, func(string, os.DirEntry, error) error { count++; return nil }))
	must(os.RemoveAll(directory))
	fmt.Println("files:", count)

	// Unix sockets and deadlines.
	name := filepath.Join(os.TempDir(), "go.sock")
	unix, err := net.Listen("unix", name)
	must(err)
	go func() { c, err := unix.Accept(); must(err); io.Copy(c, c); c.Close() }()
	c, err := net.Dial("unix", name)
	must(err)
	fmt.Fprint(c, "echo")
	buffer := make([]byte, 4)
	_, err = io.ReadFull(c, buffer)
	must(err)
	c.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	_, err = c.Read(buffer)
	fmt.Printf("unix: %s, timeout %v\n", buffer, err.(net.Error).Timeout())
	unix.Close()

	// A ticker and timers keep their order.
	start := time.Now()
	ticker := time.NewTicker(5 * time.Millisecond)
	for i := 0; i < 5; i++ {
		<-ticker.C
	}
	fmt.Println("ticker:", time.Since(start) >= 25*time.Millisecond-time.Millisecond)
	addresses, err := net.InterfaceAddrs()
	must(err)
	fmt.Println("loopback:", len(addresses) > 0 && addresses[0].String() == "127.0.0.1/8")
	host, err := net.LookupHost("localhost")
	must(err)
	fmt.Println("localhost:", len(host) > 0)
	fmt.Println("go ok")
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }
