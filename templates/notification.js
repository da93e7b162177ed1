// One notification: opened by a link from a mail or a push, read from the moment someone sees it.
const article = $("article");
const [toggleRead, toggleArchived] = ["r", "a"].map((name) => {
	const made = button("", () => {});
	made.className = "i " + name;
	$(".bar", article).append(made);
	return made;
});

function show({ read_at: read, archived_at: archived }) {
	article.classList.toggle("new", !read);
	article.classList.toggle("gone", Boolean(archived));
	toggleRead.textContent = word(read ? "js.unread" : "js.read");
	toggleArchived.textContent = word(archived ? "js.restore" : "js.archive");
}

async function set(fields) {
	const answer = await change(article.id, fields);
	if (answer) show(answer.notification);
	return answer;
}

function readOnceSeen() {
	if (document.hidden || document.prerendering) return;
	removeEventListener("visibilitychange", readOnceSeen);
	if (article.matches(".new")) set({ read: true });
}

show({ read_at: !article.matches(".new"), archived_at: article.matches(".gone") });
toggleRead.onclick = () => set({ read: article.matches(".new") });
toggleArchived.onclick = async () => {
	const archived = !article.matches(".gone");
	if (await set({ archived })) toast(word(archived ? "js.archived" : "js.restored"));
};
addEventListener("visibilitychange", readOnceSeen);
document.addEventListener("prerenderingchange", readOnceSeen);
readOnceSeen();
