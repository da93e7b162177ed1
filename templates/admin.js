// The operator's page: buttons say which request they send, and after each one the page takes over the parts that
// changed from a fresh copy of itself. So there is one place, the template, that knows how things look.
const ages = []; // of the oldest overdue message, one for each look

async function refresh() {
	const response = await fetch(location.pathname, { cache: "no-store" });
	if (!response.ok || response.redirected) return;
	const fresh = new DOMParser().parseFromString(await response.text(), "text/html");
	const held = document.activeElement?.dataset.path;
	for (const part of document.querySelectorAll("[data-live]")) {
		const next = fresh.getElementById(part.id);
		if (next) part.replaceWith(next);
	}
	if (held && !document.activeElement.dataset.path) {
		focusOn($(`[data-path="${CSS.escape(held)}"]`) ?? $("h1"));
	}
	showTimes();
	drawAge();
}

function drawAge() {
	ages.push(Number($("#queue").dataset.oldest));
	if (ages.length > 60) ages.shift();
	const top = Math.max(10, ...ages);
	const step = 240 / Math.max(1, ages.length - 1);
	const points = ages.length > 1 ? ages : [ages[0], ages[0]];
	const at = (age, i) => `${i * (ages.length > 1 ? step : 240)},${59 - (56 * age) / top}`;
	$("#age polyline").setAttribute("points", points.map(at).join(" "));
}

function ask(text) {
	const box = $("#ask");
	$("#ask-text").textContent = text;
	box.returnValue = "";
	box.showModal();
	return new Promise((answer) => {
		$("#yes").onclick = () => box.close("yes");
		box.onclose = () => answer(box.returnValue === "yes");
	});
}

function reveal(secret) {
	$("#secret-value").textContent = secret;
	$("#secret").showModal();
}

async function onClick({ target }) {
	const { method, path, body, done, ask: question } = target.dataset;
	if (!method || (question && !(await ask(question)))) return;
	const answer = await attempt(method, path, body && JSON.parse(body));
	if (!answer) return;
	if (answer.secret) reveal(answer.secret);
	const failed = answer.verdict && answer.verdict !== "sent"; // a ping tells how it went
	if (failed) toast(word("js.failed", { why: answer.error || answer.verdict }));
	else if (done) toast(word(done));
	refresh();
}

async function onSubmit(event) {
	event.preventDefault();
	const form = event.target;
	const body = Object.fromEntries([...new FormData(form)].filter(([, text]) => text));
	if (body.events) body.events = body.events.split(",").map((text) => text.trim()).filter(Boolean);
	const answer = await attempt("POST", form.dataset.path, body);
	if (!answer) return;
	reveal(answer.secret);
	form.reset();
	form.closest("details").open = false;
	refresh();
}

$("main").addEventListener("click", onClick);
for (const form of document.querySelectorAll("form[data-path]")) form.onsubmit = onSubmit;
$("#copy").onclick = async () => {
	await navigator.clipboard.writeText($("#secret-value").textContent);
	toast(word("admin.js.copied"));
};
drawAge();
setInterval(() => document.hidden || $("dialog[open]") || refresh(), 10000);
