//! Debuggers: one as small as one can be, which sends one packet of GDB's remote protocol after the other; and Debian's gdb.

use std::fmt;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use crate::guest::Program;
use crate::image::linux64;
use crate::linux::{SMALL, artefact};
use crate::session::Session;
use crate::{BOUND, minivmm, skip};

/// Where [`debugged_guest`] listens, in its directory; and the chapter's guests.
pub const SOCKET_NAME: &str = "debugger.sock";

/// The guest for debuggers, in `directory`. It listens there, unless `options` have another place.
pub fn debugged_guest(directory: &Path, options: &[&str]) -> Session {
    std::fs::write(directory.join("guest.elf"), linux64(Program::Debugged)).unwrap();
    let mut command = minivmm(["--kernel", "guest.elf", "--memory", "32M", "--debug-exit"]);
    if !options.contains(&"--gdb") {
        command.args(["--gdb", &format!("unix:{SOCKET_NAME}")]);
    }
    Session::start(command.args(options).current_dir(directory))
}

trait Stream: Read + Write + fmt::Debug {
    /// Sends no more.
    fn finish(&self);
}

impl Stream for UnixStream {
    fn finish(&self) {
        let _ = self.shutdown(Shutdown::Write);
    }
}

impl Stream for TcpStream {
    fn finish(&self) {
        let _ = self.shutdown(Shutdown::Write);
    }
}

/// A connection to a guest that stands still.
#[derive(Debug)]
pub struct Debugger {
    stream: Box<dyn Stream>,
}

impl Debugger {
    /// Connects as soon as there is a socket.
    pub fn connect(path: &Path) -> Self {
        Self::on(|| {
            let stream = UnixStream::connect(path)?;
            stream.set_read_timeout(Some(BOUND))?;
            Ok(stream)
        })
    }

    /// Connects as soon as the port is open.
    pub fn connect_tcp(port: u16) -> Self {
        Self::on(|| {
            let stream = TcpStream::connect(("127.0.0.1", port))?;
            stream.set_read_timeout(Some(BOUND))?;
            Ok(stream)
        })
    }

    fn on<T: Stream + 'static>(connect: impl Fn() -> std::io::Result<T>) -> Self {
        let deadline = Instant::now() + BOUND;
        loop {
            match connect() {
                Ok(stream) => return Self { stream: Box::new(stream) },
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Sends a request, and returns the reply.
    pub fn request(&mut self, request: &str) -> String {
        self.send(request);
        self.reply().unwrap_or_else(|| panic!("no reply to {request}"))
    }

    /// Sends a request.
    pub fn send(&mut self, request: &str) {
        let sum = request.bytes().fold(0_u8, u8::wrapping_add);
        self.send_bytes(format!("${request}#{sum:02x}").as_bytes());
    }

    /// Sends what may be no packet.
    pub fn send_bytes(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// Reads so many bytes as they are.
    pub fn read(&mut self, count: usize) -> Vec<u8> {
        (0..count).map_while(|_| self.byte()).collect()
    }

    /// Sends no more, and reads until the other side has closed the connection.
    pub fn close(mut self) {
        self.stream.finish();
        let mut rest = Vec::new();
        if let Err(error) = self.stream.read_to_end(&mut rest) {
            assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        }
    }

    /// The next reply, acknowledged; `None` at the end of the connection.
    pub fn reply(&mut self) -> Option<String> {
        while self.byte()? != b'$' {}
        let mut reply = Vec::new();
        loop {
            match self.byte()? {
                b'#' => break,
                // Run-length encoding: the last character again, as often as this one says.
                b'*' => {
                    let (last, count) = (*reply.last().unwrap(), self.byte()? - 29);
                    reply.extend(std::iter::repeat_n(last, count.into()));
                }
                byte => reply.push(byte),
            }
        }
        self.byte()?;
        self.byte()?;
        // The other side may be gone after its last reply.
        let _ = self.stream.write_all(b"+");
        Some(String::from_utf8(reply).unwrap())
    }

    fn byte(&mut self) -> Option<u8> {
        let mut byte = [0];
        match self.stream.read(&mut byte) {
            Ok(0) => None,
            Ok(_) => Some(byte[0]),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => None,
            Err(error) => panic!("the debugger waits in vain: {error}"),
        }
    }

    /// Checks that a request is carried out.
    #[track_caller]
    pub fn ok(&mut self, request: &str) {
        assert_eq!(self.request(request), "OK", "{request}");
    }

    /// Lets the guest go on as the request says, and returns why it stopped.
    pub fn go(&mut self, request: &str) -> String {
        self.request(request)
    }

    /// The general registers of the thread that was chosen last: rax, rbx, rcx, rdx, rsi, rdi, rbp, rsp, r8 to r15, rip.
    pub fn registers(&mut self) -> Vec<u64> {
        let text = self.request("g");
        let value = |at: usize| u64::from_str_radix(&text[at..at + 16], 16).unwrap().swap_bytes();
        (0..17).map(|number| value(number * 16)).collect()
    }

    /// The instruction pointer of the thread that was chosen last.
    pub fn rip(&mut self) -> u64 {
        self.registers()[16]
    }

    /// 32 bits of the guest's memory.
    pub fn word(&mut self, address: u64) -> u32 {
        let text = self.request(&format!("m{address:x},4"));
        u32::from_str_radix(&text, 16)
            .unwrap_or_else(|_| panic!("{address:#x}: {text}"))
            .swap_bytes()
    }

    /// Writes 32 bits of the guest's memory.
    pub fn set_word(&mut self, address: u64, value: u32) {
        self.ok(&format!("M{address:x},4:{:08x}", value.swap_bytes()));
    }
}

/// The blocks of gdb commands in the chapter: from the first instruction, and on a guest that runs.
pub fn chapter() -> [Vec<&'static str>; 2] {
    let text = include_str!("../../vmm/docs/step-through-a-boot.md");
    let blocks = text.split("```gdb\n").skip(1).map(|rest| rest.split("```").next().unwrap());
    let blocks: Vec<Vec<_>> = blocks.map(|block| block.lines().collect()).collect();
    blocks.try_into().unwrap()
}

/// What Debian's gdb prints for these commands; `None`, and a report, where it is not installed.
pub fn gdb<'a>(
    directory: &Path,
    symbols: Option<&Path>,
    commands: impl IntoIterator<Item = &'a str>,
    bound: Duration,
) -> Option<String> {
    let installed = Command::new("gdb").arg("--version").output();
    if let Err(error) = installed {
        skip(&format!("gdb: {error}"));
        return None;
    }
    let mut command = Command::new("gdb");
    command.args(["-batch", "-nx", "-ex", "set pagination off"]).args(symbols);
    command.args(commands.into_iter().flat_map(|line| ["-ex", line])).current_dir(directory);
    let ended = Session::start(&mut command).wait(bound);
    Some(String::from_utf8_lossy(&ended.output).into_owned() + &ended.errors)
}

/// The small Linux kernel, to boot and with its symbols; `None`, and a report, where it is not made.
pub fn small_kernel() -> Option<[PathBuf; 2]> {
    let kernel = artefact("").join(SMALL.kernel);
    let symbols = kernel.with_extension("symbols");
    if symbols.exists() {
        return Some([kernel, symbols]);
    }
    skip("linux-small is not made: `resources/prepare linux-small`");
    None
}

/// Checks what gdb prints for the first block of the chapter.
#[track_caller]
pub fn in_start_kernel(text: &str) {
    for line in ["hit Breakpoint 1, 0xffffffff", "reboot=panic_warm", "nokaslr\"", "<start_kernel+"]
    {
        assert!(text.contains(line), "{line}: {text}");
    }
}
